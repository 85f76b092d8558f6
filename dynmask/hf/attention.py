"""The attention function of accelerated models, and what hangs on each of their modules."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynmask.hf import compat
from dynmask.hf.callmask import mask_of_call
from dynmask.hf.dynamic import HeadStripes, LayerPolicy, LongCall
from dynmask.hf.keys import KeySlots, slots_of
from dynmask.hf.leased import LeasedLayer, leased_layer
from dynmask.hf.parallel import heads_here
from dynmask.hf.policy import PolicyCalls
from dynmask.hf.tally import Sequences, Tally, kind_of
from dynmask.masks import Stripes
from dynmask.ops import attention
from dynmask.ops.attention import resolve

DENSE = "transformers sdpa"

_log = logging.getLogger(__name__)


class Attached:
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

    def meet(self, heads: int) -> None:
        """Fit to the query heads of a call: tensor parallelism leaves a process some of them."""
        whole = self.stripes
        if whole is None or heads == whole.heads:
            return
        stripes = heads_here(self.layer.module, whole, heads)
        self.striped = not bool(stripes.full_heads.all())
        self._copies = HeadStripes(stripes)
        dynamic = self.dynamic
        if dynamic is not None:
            dense = bool(stripes.full_heads.any())
            self.dynamic = LayerPolicy(dynamic.settings, stripes) if dense else None
        # Last: another thread that finds these heads must find all that belongs to them.
        self.stripes = stripes

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
        if self.dynamic is None:
            return None
        if not self.dynamic.applies(slots, query.shape[2]):
            if self.dynamic.settings.applies(query.shape[2], slots.length) and slots.has_gaps:
                self._warn(
                    "attention_mask has holes between a row's tokens: dynamic masks leave such "
                    "calls dense; pad at one side only"
                )
            return None
        if query.requires_grad and query.device.type == "cpu":
            self._warn(
                "gradients are on: on the CPU dynamic masks then run a dense kernel and save "
                "nothing; for inference call the model under torch.no_grad()"
            )
        call = LongCall(self.dynamic, kind, scale=scale, impl=self.impl, tally=self.tally)
        return call.attend(query, key, value, slots)

    def _warn(self, message: str) -> None:
        if self.tally.first_time(message):
            _log.warning(message)

    def count(self, kind: str, impl: str, sequences: Sequences) -> None:
        """Count what a call under the stripes of all heads computed."""
        assert self.stripes is not None
        self.tally.add_layer(kind, impl, self.layer.index, self.stripes, sequences)

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
    attention_mask: Any,
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
        value: ``[B, G, K, Dv]``, as long as ``key``.
        attention_mask: From ``key_mask``. A 4-d mask from the user comes here unchanged.
        dropout: Probability of dropout.
        scaling: Factor of the logits, ``D ** -0.5`` by default.
        is_causal: May only be True or None.
        **arguments: Further arguments; those that could change the result are refused.

    Returns:
        ``[B, Q, H, Dv]`` and None.

    Raises:
        ValueError: See ``accelerate``.
    """
    compat.refuse_unknown_arguments(module, arguments, is_causal=is_causal)
    layer, dtype = leased_layer(key, value), compat.autocast_dtype(query)
    if dtype is None:
        return _run(module, query, key, value, attention_mask, layer, dropout, scaling)
    # Rotary embeddings have left queries and keys wider than values.
    query, key, value = (x.to(dtype) for x in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        return _run(module, query, key, value, attention_mask, layer, dropout, scaling)


def _run(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    layer: LeasedLayer | None,
    dropout: float,
    scaling: float | None,
) -> tuple[Tensor, None]:
    """Attend in one dtype; ``layer`` is the cache's that gave the keys, if it is a run's."""
    attached: Attached | None = vars(module).get(compat.ATTACHED)
    run = None if attached is None else attached.tally
    attention_mask = mask_of_call(attention_mask, module, run)
    if attached is not None:
        attached.meet(query.shape[1])
    if attached is None or layer is None:
        return _attend(attached, module, query, key, value, attention_mask, dropout, scaling)
    if isinstance(attention_mask, Tensor):
        raise ValueError(
            f"layer {attached.layer.index} got an attention mask that is not plain causal, and a "
            "cache of run.cache(): pass a 2-d attention_mask, or another cache"
        )
    slots = slots_of(attention_mask, key, layer.get_seq_length())
    layer.check(slots)
    if layer.runs(query.shape[2]):
        _refuse_dropout(dropout)
        found, impl = layer.attend(query, slots, scale=scaling, impl=attached.impl)
        attached.tally.add(kind_of(query.shape[2], slots.length), impl)
        out = found.transpose(1, 2).contiguous()
    else:
        key, value = layer.whole(slots)
        out, _ = _attend(attached, module, query, key, value, attention_mask, dropout, scaling)
    layer.settle(query, slots, scale=scaling)
    return out, None


def _attend(
    attached: Attached | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: KeySlots | Tensor | None,
    dropout: float,
    scaling: float | None,
) -> tuple[Tensor, None]:
    """Attend to keys that are one token each; arguments as in `dynmask_attention`."""
    # Moshi's configuration names a window, and its layers get plain causal masks.
    plain = isinstance(attention_mask, KeySlots)
    window = attached is not None and attached.own is not None and not plain
    q_len = query.shape[2]
    if window or isinstance(attention_mask, Tensor):
        if attached is not None and attached.sparse:
            raise ValueError(
                f"layer {attached.layer.index} got an attention mask that is not plain causal "
                "(packed documents, an overlay, a 4-d attention_mask, or under torch.compile no "
                "attention_mask, which transformers reads as packed), or accelerate() was opened "
                "during this call: pass a 2-d attention_mask and one document a row, or use "
                'mode="dense"'
            )
        if attached is not None:
            k_len = key.shape[2] if attention_mask is None else attention_mask.shape[-1]
            attached.tally.add(kind_of(q_len, k_len), attached.own or DENSE)
        return compat.sdpa_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling
        )
    if attached is not None and attached.sparse and key.shape[3] != value.shape[3]:
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        width = max(key.shape[3], value.shape[3])
        q, k, v = (_widened(heads, width) for heads in (query, key, value))
        out, _ = _attend(attached, module, q, k, v, attention_mask, dropout, scaling)
        return out[..., : value.shape[3]], None
    slots = slots_of(attention_mask, key, key.shape[2])
    if key.shape[2] < slots.length:
        raise ValueError(
            f"a layer of the cache holds {key.shape[2]} tokens of {slots.length}: an earlier call "
            "was cut off (out of memory, interrupted); make a new cache and give it the whole "
            "prompt again"
        )
    key, value = key[:, :, : slots.length], value[:, :, : slots.length]
    kind = kind_of(q_len, slots.length)
    found = None if attached is None else attached.chosen(query, key, value, slots, kind, scaling)
    if attached is not None and found is not None:
        _refuse_dropout(dropout)
        out, impl = found
        attached.tally.add(kind, impl)
        return out.transpose(1, 2).contiguous(), None
    if attached is None or not attached.striped:
        if attached is not None:
            attached.tally.add(kind, DENSE)
            attached.tally.add_dense(kind, query.shape[1], _shape(kind, slots, query))
        return compat.sdpa_attention(
            module, query, key, value, slots.dense(q_len), dropout=dropout, scaling=scaling
        )
    _refuse_dropout(dropout)
    mask = attached.mask(slots, query.device)
    impl = resolve(attached.impl, query, key, value, mask)
    out = attention(query, key, value, mask, scale=scaling, impl=impl)
    attached.tally.add(kind, impl)
    attached.count(kind, impl, _shape(kind, slots, query))
    return out.transpose(1, 2).contiguous(), None


def _widened(heads: Tensor, width: int) -> Tensor:
    """Return ``[B, H, N, width]``, zeros behind, which change no logit and no other value."""
    return functional.pad(heads, (0, width - heads.shape[3]))


def _refuse_dropout(dropout: float) -> None:
    if dropout > 0:
        raise ValueError("sparse attention has no dropout: call model.eval() first")


def _shape(kind: str, slots: KeySlots, query: Tensor) -> Sequences:
    """Return what a call computed; decode is left out, its shapes differ at every step."""
    return () if kind == "decode" else slots.sequences(query.shape[2])
