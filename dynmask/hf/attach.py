"""Accelerate: run a model's attention under a plan's masks and dynamic ones (DAM, stage 2)."""

from __future__ import annotations

import dataclasses
import time
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dynmask.baselines import Policy
from dynmask.dam import MaskPlan
from dynmask.dam.dynamic import Dynamic
from dynmask.hf import compat
from dynmask.hf.dynamic import HeadStripes, LayerPolicy, LongCall
from dynmask.hf.fingerprint import check_fingerprint
from dynmask.hf.keys import KeySlots, key_mask, slots_of
from dynmask.hf.policy import PolicyCalls
from dynmask.hf.switch import Switch
from dynmask.hf.tally import Tally, kind_of
from dynmask.masks import Stripes
from dynmask.ops import attention, choose
from dynmask.ops.attention import BACKENDS

NAME = "dynmask"
DENSE = "transformers sdpa"
OWN_WINDOW = "own window"
MODES = ("auto", "dynamic", "static", "dense")


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
        coverage: The quality asked for, in (0, 1]: of dynamic masks (`Dynamic.coverage`), and of
            the stripes that the plan's gate keeps. By default the plan's own, or 0.98.
        dynamic: How dynamic masks are made, in all else; the defaults are for every model.
        policy: Another method instead, from ``dynmask.baselines``, for comparisons: in every call
            of every full causal layer, decode included. Without plan, coverage and dynamic.
        impl: "auto", or a backend of ``dynmask.attention`` that must run every sparse layer.

    Returns:
        The run.

    Raises:
        ValueError: Mode or impl is unknown, or the mode needs a plan; coverage is out of range;
            a policy stands beside a plan or settings of dynamic masks;
            the plan is of another model; the model is accelerated already, or has no attention
            layer that dynmask knows. Later, from the model's forward: packed documents, 4-d
            attention masks, or attention arguments that dynmask does not know (attention sinks,
            softcap), where a layer is not dense.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; use one of {MODES}")
    if plan is None and mode == "static":
        raise ValueError('mode="static" needs a plan: make one with calibrate, or use "dynamic"')
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
    if coverage is None and dynamic is None and plan is not None:
        coverage = plan.settings.coverage
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
        compat.refuse_attached(model)
        layers = compat.attention_layers(model)
        if plan is not None:
            _check_plan(model, plan, layers)
        self.model = model
        self.mode = mode if policy is None else policy.name
        self.impl = impl
        self._tally = Tally()
        self._attached: list[_Attached] = []
        for layer in layers:
            own = OWN_WINDOW if layer.own_window is not None else None
            stripes = _stripes(plan, layer, mode) if own is None else None
            attached = _Attached(layer, stripes, impl, self._tally, own)
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
        self._switch: Switch | None = Switch(model, layers, NAME)
        for attached in self._attached:
            setattr(attached.layer.module, compat.ATTACHED, attached)

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
        if self._switch is None:
            return
        for attached in self._attached:
            vars(attached.layer.module).pop(compat.ATTACHED, None)
        self._switch.undo()
        self._switch = None

    def stats(self) -> dict[str, Any]:
        """Tell what ran so far, as plain values.

        Returns:
            ``layers``: how many are attached, and of these "sparse", "dense" and "own window".
            ``mode`` and ``impl``: as asked for (``impl_requested``), and by call kind (prefill,
            chunk, decode) the number of calls of each implementation that really ran.
            ``calls``: calls by kind. ``density``: by kind, the pairs that the masks show over the
            causal pairs; ``computed_density``: the pairs that were evaluated over the causal
            pairs, 1 for a dense kernel. Both count prefill and chunks of every layer that is not
            left to its own window; dynamic masks as they were made, a summary as one key.
            ``mask_seconds``: time spent on masks and schedules, outside of attention itself; for
            dynamic masks on a GPU the device's own.
        """
        own = sum(a.own is not None for a in self._attached)
        sparse = sum(a.sparse for a in self._attached)
        masks = {a.layer.index: a.stripes for a in self._attached if a.stripes is not None}
        return {
            "layers": {
                "attached": len(self._attached),
                "sparse": sparse,
                "dense": len(self._attached) - own - sparse,
                "own window": own,
            },
            "mode": self.mode,
            "impl_requested": self.impl,
            **self._tally.summary(masks),
            "mask_seconds": self._tally.mask_seconds,
        }


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


class _Attached:
    """What one attention module of an accelerated model needs; hangs on the module itself."""

    def __init__(
        self,
        layer: compat.AttentionLayer,
        stripes: Stripes | None,
        impl: str,
        tally: Tally,
        own: str | None,
    ):
        self.layer = layer
        self.stripes = stripes
        self.dynamic: LayerPolicy | None = None
        self.policy: PolicyCalls | None = None
        self.impl = impl
        self.tally = tally
        self.own = own
        self.striped = stripes is not None and not bool(stripes.full_heads.all())
        self._copies = None if stripes is None else HeadStripes(stripes)

    @property
    def sparse(self) -> bool:
        """Whether the layer may leave keys out."""
        return self.striped or self.dynamic is not None or self.policy is not None

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Refuse to be copied or pickled: a copy would report to this run and end with nobody."""
        raise ValueError(
            "the model is inside accelerate(): copy or pickle it before the with block or after it"
        )

    def chosen(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slots: KeySlots,
        kind: str,
        scale: float | None,
    ) -> tuple[Tensor, str] | None:
        """Attend under masks that are chosen from this call; None for a call without them."""
        if self.policy is not None:
            return self.policy.attend(query, key, value, slots, kind=kind, scale=scale)
        if self.dynamic is None or not self.dynamic.applies(slots, query.shape[2]):
            return None
        call = LongCall(self.dynamic, kind, scale=scale, impl=self.impl, tally=self.tally)
        return call.attend(query, key, value, slots)

    def mask(self, slots: KeySlots, device: torch.device) -> Stripes:
        """Return the stripes over this call's padding, on its device."""
        started = time.perf_counter()
        assert self._copies is not None
        stripes = self._copies.on(device)
        padding = slots.padding
        mask = stripes if padding is None else stripes & padding
        self.tally.add_seconds(time.perf_counter() - started)
        return mask


@torch.compiler.disable
def dynmask_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attention function that ``accelerate`` registers with transformers.

    Args:
        module: The attention module; what it needs of the run hangs on it.
        query: ``[B, H, Q, D]``.
        key: ``[B, G, K, D]``, or longer with a StaticCache.
        value: Of the same shape as ``key``.
        attention_mask: From ``key_mask``: ``[B, K]`` for plain causal attention, else
            ``[B, 1, Q, K]``. A 4-d mask from the user comes here unchanged.
        dropout: Probability of dropout.
        scaling: Factor of the logits, ``D ** -0.5`` by default.
        is_causal: May only be True or None.
        **arguments: Further arguments; those that could change the result are refused.

    Returns:
        ``[B, Q, H, D]`` and None.

    Raises:
        ValueError: See ``accelerate``.
    """
    compat.refuse_unknown_arguments(module, arguments, is_causal=is_causal)
    attached: _Attached | None = vars(module).get(compat.ATTACHED)
    window = attached is not None and attached.own is not None
    q_len = query.shape[2]
    if window or (attention_mask is not None and attention_mask.ndim == 4):
        if attached is not None and attached.sparse:
            raise ValueError(
                f"layer {attached.layer.index} got an attention mask that is not plain causal "
                "(packed documents, an overlay, a 4-d attention_mask, or under torch.compile no "
                "attention_mask, which transformers reads as packed): pass a 2-d attention_mask "
                'and one document a row, or use mode="dense"'
            )
        if attached is not None:
            k_len = key.shape[2] if attention_mask is None else attention_mask.shape[-1]
            attached.tally.add(kind_of(q_len, k_len), attached.own or DENSE, attached.layer.index)
        return compat.sdpa_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling
        )
    slots = slots_of(attention_mask, key)
    key, value = key[:, :, : slots.length], value[:, :, : slots.length]
    kind = kind_of(q_len, slots.length)
    found = None if attached is None else attached.chosen(query, key, value, slots, kind, scaling)
    if attached is not None and found is not None:
        _refuse_dropout(dropout)
        out, impl = found
        attached.tally.add(kind, impl, attached.layer.index)
        return out.transpose(1, 2).contiguous(), None
    if attached is None or not attached.striped:
        if attached is not None:
            attached.tally.add(kind, DENSE, attached.layer.index, _shape(kind, slots, query))
        return compat.sdpa_attention(
            module, query, key, value, slots.dense(q_len), dropout=dropout, scaling=scaling
        )
    _refuse_dropout(dropout)
    mask = attached.mask(slots, query.device)
    impl = attached.impl
    if impl == "auto":
        impl = choose(query, key, value, mask)
    out = attention(query, key, value, mask, scale=scaling, impl=impl)
    attached.tally.add(kind, impl, attached.layer.index, _shape(kind, slots, query))
    return out.transpose(1, 2).contiguous(), None


def _refuse_dropout(dropout: float) -> None:
    if dropout > 0:
        raise ValueError("sparse attention has no dropout: call model.eval() first")


def _shape(kind: str, slots: KeySlots, query: Tensor) -> tuple[tuple[int, int], ...]:
    """Return what a call computed; decode is left out, its shapes differ at every step."""
    return () if kind == "decode" else slots.sequences(query.shape[2])
