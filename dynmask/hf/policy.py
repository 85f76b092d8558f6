"""Run another method's masks in a model's layers: the glue of ``dynmask.baselines``."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from dynmask.baselines import Policy, Selector
from dynmask.hf.keys import KeySlots, row_by_row
from dynmask.hf.tally import Tally
from dynmask.masks import Lifetimes, Mask, Stripes
from dynmask.ops import attention
from dynmask.ops.attention import resolve


class PolicyCalls:
    """The attention calls of one layer under a policy.

    A prefill starts anew. Where there is padding, each batch row is a sequence of its own. Beam
    search moves rows between calls: a policy that remembers what it chose for them refuses. Each
    thread has its own sequences: what it began, it must end.

    Args:
        policy: The method.
        layer: The layer's place.
        layers: How many the model has.
        impl: "auto" or a backend.
        tally: Takes the pairs and the time spent on masks.
    """

    def __init__(self, policy: Policy, layer: int, layers: int, *, impl: str, tally: Tally):
        self.policy = policy
        self.impl = impl
        self.tally = tally
        self._place = layer, layers
        self._of_thread = threading.local()

    @property
    def _selectors(self) -> dict[int | None, Selector]:
        """What chooses for each batch row, or for all at once (None), in this thread."""
        found: dict[int | None, Selector] = vars(self._of_thread).setdefault("selectors", {})
        return found

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slots: KeySlots,
        *,
        kind: str,
        scale: float | None,
    ) -> tuple[Tensor, str]:
        """Attend in one call; arguments and results are those of `LongCall.attend`.

        Raises:
            ValueError: The real tokens of a row are not one run, the call goes on where none ended
                (beam search, a cache cropped elsewhere, another thread's), or the backend cannot
                run it.
        """
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if query.shape[2] == slots.length:
            self._selectors.clear()
        if slots.padding is None and (len(query) == 1 or self._selector(None).batched):
            return self._sequence(None, query, key, value, kind=kind, scale=scale)

        def attend(row: int, *tensors: Tensor) -> tuple[Tensor, str]:
            return self._sequence(row, *tensors, kind=kind, scale=scale)

        return row_by_row(attend, query, key, value, slots)

    def _selector(self, row: int | None) -> Selector:
        if row not in self._selectors:
            self._selectors[row] = self.policy.selector(*self._place)
        return self._selectors[row]

    def _sequence(
        self, row: int | None, query: Tensor, key: Tensor, value: Tensor, *, kind: str, scale: float
    ) -> tuple[Tensor, str]:
        """Attend whole sequences of one length."""
        with self.tally.clock(query.device), torch.no_grad():
            mask = self._selector(row).mask(query, key, scale=scale)
        if mask is not None:
            key, value = repeated(key, mask), repeated(value, mask)
        impl = resolve(self.impl, query, key, value, mask)
        out = attention(query, key, value, mask, scale=scale, impl=impl)
        self._count(kind, impl, mask, query, key.shape[2])
        return out, f"{self.policy.name} {impl}"

    def _count(self, kind: str, impl: str, mask: Mask | None, query: Tensor, k_len: int) -> None:
        batch, heads, q_len, _ = query.shape
        begin = k_len - q_len
        causal = batch * heads * (k_len * (k_len + 1) - begin * (begin + 1)) // 2
        if mask is None:
            self.tally.add_pairs(kind, causal=causal, shown=causal, computed=causal)
            return
        pairs = mask.visible_pairs(q_len, k_len)
        # One number may stand for many batch rows and heads.
        shown = pairs.sum() * (batch * heads // pairs.numel())
        # Dense kernels evaluate every pair, whatever the mask shows.
        computed = shown if impl in ("cpu", "triton") else causal
        self.tally.add_pairs(kind, causal=causal, shown=shown, computed=computed)


def repeated(tensor: Tensor, mask: Mask) -> Tensor:
    """Return keys or values ``[B, G, K, D]`` as often as the mask has heads.

    Methods that choose for each query head need a kv head for each.
    """
    groups = tensor.shape[1]
    if isinstance(mask, Stripes):
        return tensor
    heads = int((mask.expiry if isinstance(mask, Lifetimes) else mask.counts).shape[1])
    return tensor if heads in (1, groups) else tensor.repeat_interleave(heads // groups, 1)
