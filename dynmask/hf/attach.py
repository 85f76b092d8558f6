"""Accelerate: run a model's attention under a plan's masks and dynamic ones (DAM, stage 2)."""

from __future__ import annotations

import dataclasses
import threading
from types import TracebackType
from typing import Any

from torch import nn

from dynmask.baselines import Policy
from dynmask.dam import MaskPlan
from dynmask.dam.dynamic import Dynamic
from dynmask.hf import compat
from dynmask.hf.attention import Attached, dynmask_attention
from dynmask.hf.capped import SMALLEST, CappedLayer
from dynmask.hf.dynamic import LayerPolicy
from dynmask.hf.fingerprint import check_fingerprint
from dynmask.hf.keys import key_mask
from dynmask.hf.leased import Lease, LeasedCache
from dynmask.hf.parallel import split_group
from dynmask.hf.policy import PolicyCalls
from dynmask.hf.run_cache import RunLayer
from dynmask.hf.switch import Switch
from dynmask.hf.tally import Tally
from dynmask.masks import Stripes
from dynmask.ops.attention import BACKENDS

NAME = "dynmask"
OWN_WINDOW = "own window"
MODES = ("auto", "dynamic", "static", "dense")

# Of two threads that attach to one model, the second must find the first's marks.
_attaching = threading.RLock()


def accelerate(
    model: nn.Module,
    plan: MaskPlan | None = None,
    *,
    mode: str = "auto",
    coverage: float | None = None,
    dynamic: Dynamic | None = None,
    policy: Policy | None = None,
    impl: str = "auto",
) -> Run:
    """Run ``model``'s attention under dynamic masks and a plan's until the run is closed.

    ``with accelerate(model) as run: model.generate(...)``. Acceleration starts at once, so
    the run may also be kept and ended with ``run.close()``. Only this model is touched, and it is
    given back as it was, also after an exception inside the block.

    Prefill, chunked prefill and decode; DynamicCache and StaticCache; left and right padding;
    greedy, sampled and beam search, assisted decoding. For inference: no dropout, and gradients
    only where the chosen implementation has them. A model under ``torch.compile`` runs with graph
    breaks around attention, and must be given an ``attention_mask``: without one, transformers
    makes it a mask for packed documents.

    Several threads may run the model at once, each with caches of its own. Open and close the run
    while none of them is inside the model: a call that is under way ends with a ``ValueError``,
    unless all its layers run one way. ``generate`` is many calls, and goes on after a ``close``
    with the model as it was.

    Under transformers' tensor parallelism (``tp_plan``) all processes accelerate their model by the
    same plan; each runs its heads by their part of it and counts them alone.

    Dynamic masks are made anew in every prefill and every chunk, from that call's own attention;
    see `dynmask.dam.dynamic.Dynamic`. Calls that are too short for them, and decode, look at every
    key with these heads. Layers whose heads are all dense, and layers with a window of their own
    (sliding or chunked attention), run transformers' ``sdpa`` function under their own exact mask.

    Args:
        model: The causal language model that the plan was made for, in any float dtype, on any
            device.
        plan: From ``calibrate`` or ``MaskPlan.load``; None for dynamic masks alone.
        mode: "auto": without a plan "dynamic"; with one, the heads that its gate keeps static run
            on their stripes, the others dynamic. "dynamic": every head dynamic. "static": every
            head on its stripes. "dense": every head dense, the control.
        coverage: The quality asked for, in (0, 1]: of dynamic masks (`Dynamic.coverage`, 0.985 by
            default), and of the stripes that the plan's gate keeps (by default the plan's own).
        dynamic: How dynamic masks are made, in all else; the defaults are for every model.
        policy: Another method instead, from ``dynmask.baselines``, for comparisons: in every call
            of every full causal layer, decode included. Without plan, coverage and dynamic. It
            remembers, for each thread, one sequence of calls (or batch of them).
        impl: "auto", or a backend of ``dynmask.attention`` that must run every call of a sparse
            layer that hides keys.

    Returns:
        The run.

    Raises:
        ValueError: Mode or impl is unknown, or the mode needs a plan; coverage is out of range;
            plan, dynamic or policy is of another type; a policy stands beside a plan or settings
            of dynamic masks; the plan is of another model; the model is accelerated already, or has
            no attention layer that dynmask knows. Later, from the model's forward: packed
            documents, 4-d attention masks, or attention arguments that dynmask does not know
            (attention sinks, softcap), where a layer is not dense.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; use one of {MODES}")
    if plan is None and mode == "static":
        raise ValueError('mode="static" needs a plan: make one with calibrate, or use "dynamic"')
    _check_types(plan, dynamic, policy)
    if plan is not None and coverage is not None:
        plan = plan.with_coverage(coverage)
    if policy is not None:
        given = {"plan": plan, "coverage": coverage, "dynamic": dynamic}
        beside = [name for name, value in given.items() if value is not None]
        if beside or mode != "auto":
            raise ValueError(
                f"policy={policy.name!r} runs alone: leave out {', '.join(beside) or 'mode'}"
            )
    settings = Dynamic() if dynamic is None else dynamic
    if coverage is not None:
        settings = dataclasses.replace(settings, coverage=coverage)
    return Run(model, plan, mode=mode, dynamic=settings, policy=policy, impl=impl)


class Run:
    """An accelerated model; a context manager. See ``accelerate``."""

    def __init__(
        self,
        model: nn.Module,
        plan: MaskPlan | None,
        *,
        mode: str,
        dynamic: Dynamic,
        policy: Policy | None,
        impl: str,
    ):
        if impl != "auto" and impl not in BACKENDS:
            raise ValueError(f"impl={impl!r} is unknown; use one of {['auto', *BACKENDS]}")
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a loaded model, got {type(model).__name__}")
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"model {type(model).__name__} is an encoder-decoder; accelerate takes causal "
                "language models that are a decoder alone"
            )
        compat.refuse_attached(model)
        layers = compat.attention_layers(model)
        if plan is not None:
            _check_plan(model, plan, layers)
        self.model = model
        self.mode = mode if policy is None else policy.name
        self.impl = impl
        self._tally = Tally()
        self._lease = Lease(split_group(model, (layer.module for layer in layers)))
        self._attached: list[Attached] = []
        for layer in layers:
            own = OWN_WINDOW if layer.own_window is not None else None
            stripes = _stripes(plan, layer, mode) if own is None else None
            attached = Attached(layer, stripes, impl, self._tally, own)
            if own is None and policy is not None:
                place = len(self._attached), len(layers)
                attached.policy = PolicyCalls(policy, *place, impl=impl, tally=self._tally)
            elif (
                stripes is not None
                and mode in ("auto", "dynamic")
                and bool(stripes.full_heads.any())
            ):
                attached.dynamic = LayerPolicy(dynamic, stripes)
            self._attached.append(attached)
        compat.register(NAME, dynmask_attention, key_mask)
        with _attaching:
            compat.refuse_attached(model)  # Another thread may have come first since.
            # First, and last in `close`: a layer that runs ours finds what it needs.
            for attached in self._attached:
                setattr(attached.layer.module, compat.ATTACHED, attached)
            self._switch: Switch | None = Switch(model, layers, NAME)

    def __enter__(self) -> Run:
        if self._switch is None:
            raise ValueError("this run is closed: call accelerate again")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the model back as it was; the statistics stay. A second call does nothing."""
        with _attaching:
            if self._switch is None:
                return
            self._lease.end()
            self._switch.undo()
            self._switch = None
            for attached in self._attached:
                vars(attached.layer.module).pop(compat.ATTACHED, None)

    def cache(self, max_cache_tokens: int | None = None) -> LeasedCache:
        """Make a cache of this run's own, for ``generate(past_key_values=...)``.

        Without a number it keeps all that the run's masks may ask for. Heads that run on a plan's
        stripes give up the keys that no later row sees. Heads under dynamic masks keep every key,
        and a decode step looks at the blocks that it chooses, as a prefill does
        (`dynmask.dam.dynamic.Dynamic`); calls of 2 to 64 rows behind a prompt see every key with
        these heads. Keys and values are written in place, where transformers' own dynamic cache
        copies all of them at every step.

        With a number each layer holds at most so many tokens (a call's own come on top while it
        runs). Once a sequence is longer, the tokens that its last 64 rows hardly look at with any
        of the layer's heads are given up: after the prefill, and whenever the slots are full again.
        What no head has looked at when it is asked for, by a later question or while an answer is
        written, may be gone. Rows then run dense over the slots.

        Left and right padding, beams, assisted decoding and chunks work as with transformers' own
        caches; `crop` only for the last 64 tokens where heads forget, and only for tokens since
        keys were given up last where there is a number.

        Args:
            max_cache_tokens: Slots, at least 136: twice the first 4 and the last 64, which stay.

        Raises:
            ValueError: The number is too small, the run is closed or runs another method, or layers
                of the model share their keys (Gemma 3n).
        """
        if max_cache_tokens is not None and (
            not isinstance(max_cache_tokens, int) or max_cache_tokens < SMALLEST
        ):
            raise ValueError(
                f"max_cache_tokens={max_cache_tokens!r} must be an integer of at least {SMALLEST}: "
                "the first and the last tokens stay"
            )
        if self._switch is None:
            raise ValueError("this run is closed: call accelerate again")
        if any(a.policy is not None for a in self._attached):
            raise ValueError(f"{self.mode!r} chooses keys by itself: use a cache of transformers")
        config, lease = compat.text_config(self.model), self._lease
        if getattr(config, "num_kv_shared_layers", None):
            raise ValueError(
                f"layers of {type(self.model).__name__} share their keys (num_kv_shared_layers="
                f"{config.num_kv_shared_layers}): leave past_key_values out, or use a cache of "
                "transformers"
            )
        with _attaching:
            lease.watch(attached.layer.module for attached in self._attached)
        if max_cache_tokens is not None:
            cap = max_cache_tokens
            return LeasedCache(config, lambda index: CappedLayer(cap, lease))
        by_index = {a.layer.index: a for a in self._attached if a.stripes is not None}
        return LeasedCache(
            config, lambda index: RunLayer(by_index[index], lease) if index in by_index else None
        )

    def stats(self) -> dict[str, Any]:
        """Tell what ran so far, as plain values.

        Returns:
            ``layers``: how many are attached, and of these "sparse", "dense" and "own window".
            ``mode`` and ``impl``: as asked for (``impl_requested``), and by call kind (prefill,
            chunk, decode) the number of calls of each implementation that really ran.
            ``calls``: calls by kind. ``density``: by kind, the pairs that the masks show over the
            causal pairs; ``computed_density``: the pairs that were evaluated over the causal
            pairs, 1 for a dense kernel. Both count prefill and chunks of every layer that is not
            left to its own window; dynamic masks as they were made, a summary as one key. Over
            `cache` calls of few rows are counted without the heads that gave keys up, and decode
            steps that chose their keys are counted too.
            ``mask_seconds``: time spent on masks and schedules, outside of attention itself; for
            dynamic masks on a GPU the device's own.
        """
        own = sum(a.own is not None for a in self._attached)
        sparse = sum(a.sparse for a in self._attached)
        return {
            "layers": {
                "attached": len(self._attached),
                "sparse": sparse,
                "dense": len(self._attached) - own - sparse,
                "own window": own,
            },
            "mode": self.mode,
            "impl_requested": self.impl,
            **self._tally.summary(),
            "mask_seconds": self._tally.mask_seconds,
        }


def _check_types(plan: object, dynamic: object, policy: object) -> None:
    """Refuse what a user may take for a plan, for settings or for a method."""
    if plan is not None and not isinstance(plan, MaskPlan):
        raise ValueError(
            f"plan must be a MaskPlan, got {type(plan).__name__}: read a saved one with "
            "MaskPlan.load(folder), or make one with calibrate"
        )
    if dynamic is not None and not isinstance(dynamic, Dynamic):
        raise ValueError(
            f"dynamic must be dynmask.dam.Dynamic(...), got {type(dynamic).__name__}; for the "
            "quality alone give coverage"
        )
    if policy is not None and not isinstance(policy, Policy):
        raise ValueError(
            f"policy must be a method of dynmask.baselines, such as StreamingLLM(window=256), "
            f"got {policy!r:.80}"
        )


def _check_plan(model: nn.Module, plan: MaskPlan, layers: list[compat.AttentionLayer]) -> None:
    """Refuse a plan that was made for another model."""
    check_fingerprint(model, plan.fingerprint)
    unknown = plan.layers.keys() - {x.index for x in layers if x.own_window is None}
    if unknown:
        raise ValueError(
            f"the plan holds layers {sorted(unknown)}, which are no full causal attention "
            "layers of this model: calibrate it again"
        )


def _stripes(plan: MaskPlan | None, layer: compat.AttentionLayer, mode: str) -> Stripes | None:
    """Return what a layer's heads see in short calls; None for a layer that a plan leaves out."""
    if plan is None:
        return Stripes.causal(layer.heads)
    if layer.index not in plan.layers:
        return None
    return plan.stripes(layer.index, "dense" if mode == "dynamic" else mode)
