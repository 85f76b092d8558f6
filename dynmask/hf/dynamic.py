"""The per-call policy of ``accelerate``: which heads of a layer run under dynamic masks, and when.

A long call (prefill or chunk) runs its dynamic heads under masks made from this very call. Short
calls and decode run on the layer's stripes, with dynamic heads looking at every key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynmask.dam.dynamic import Dynamic, dynamic_attention
from dynmask.hf.keys import KeySlots, row_by_row
from dynmask.hf.tally import Tally
from dynmask.masks import Stripes
from dynmask.masks.schedule import head_schedule
from dynmask.ops import attention
from dynmask.ops.attention import resolve


class HeadStripes:
    """Stripes of some heads, copied to each device once, so that what is derived is kept.

    Args:
        stripes: On the CPU, without padding.
    """

    def __init__(self, stripes: Stripes):
        self.stripes = stripes
        self._copies: dict[torch.device, Stripes] = {}

    def on(self, device: torch.device) -> Stripes:
        """Return the stripes on ``device``."""
        if device not in self._copies:
            stripes = self.stripes.to(device)
            # Padded copies share what was derived before they were made: derive it now, once.
            assert stripes.derived is not None
            if device.type == "cpu":
                for head in range(stripes.heads):
                    head_schedule(stripes, head)
            self._copies[device] = stripes
        return self._copies[device]


class Split:
    """The heads of one layer: which run under dynamic masks in a long call, and which do not.

    Key heads are taken whole, since their query heads share a choice: one stays on the plan's
    stripes if the plan keeps all of its query heads static, else it runs dynamic.

    Args:
        stripes: The layer's stripes on the CPU; full heads are the dynamic ones.
        groups: Key heads ``G``.

    Attributes:
        static: Stripes of the heads that are not dynamic; None if there are none.
    """

    def __init__(self, stripes: Stripes, groups: int):
        ratio = stripes.heads // groups
        dynamic = stripes.full_heads.view(groups, ratio).any(1).repeat_interleave(ratio)
        self._heads = dynamic.nonzero().flatten(), (~dynamic).nonzero().flatten()
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.static: HeadStripes | None = None
        rest = self._heads[1]
        if len(rest):
            self.static = HeadStripes(stripes.of_heads(rest.tolist()))

    def heads(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the numbers of the dynamic heads and of the others, on ``device``."""
        if device not in self._copies:
            dynamic, rest = self._heads
            self._copies[device] = dynamic.to(device), rest.to(device)
        return self._copies[device]


class LayerPolicy:
    """When and how one layer runs under dynamic masks.

    Args:
        settings: How masks are chosen.
        stripes: The layer's stripes on the CPU; full heads are the dynamic ones.

    Attributes:
        settings: As given.
        every: All heads' stripes, for sequences too short for dynamic masks.
    """

    def __init__(self, settings: Dynamic, stripes: Stripes):
        self.settings = settings
        self.every = HeadStripes(stripes)
        self._split: Split | None = None

    def applies(self, slots: KeySlots, q_len: int) -> bool:
        """Say whether any sequence of a call is long enough for dynamic masks."""
        return any(
            self.settings.applies(length - first, length)
            for first, length in slots.sequences(q_len)
        )

    def split(self, groups: int) -> Split:
        """Return the layer's heads split, for ``groups`` key heads."""
        if self._split is None:
            self._split = Split(self.every.stripes, groups)
        return self._split


class LongCall:
    """One call of one layer in which some sequence runs under dynamic masks.

    Args:
        policy: The layer's.
        kind: Of the call, for the tally.
        scale: Factor of the logits.
        impl: "auto" or a backend.
        tally: Takes the pairs and the time spent on masks.
    """

    def __init__(
        self, policy: LayerPolicy, kind: str, *, scale: float | None, impl: str, tally: Tally
    ):
        self.policy = policy
        self.kind = kind
        self.scale = scale
        self.impl = impl
        self.tally = tally

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, slots: KeySlots
    ) -> tuple[Tensor, str]:
        """Attend, sequence by sequence where there is padding.

        Args:
            query: ``[B, H, Q, D]``.
            key: ``[B, G, K, D]``.
            value: ``[B, G, K, D]``.
            slots: The call's key slots.

        Returns:
            ``[B, H, Q, D]``, 0 in rows of padding, and what ran it.

        Raises:
            ValueError: The real tokens of a row are not one run, or the backend cannot run it.
        """
        if slots.padding is None:
            return self._sequences(query, key, value)
        return row_by_row(lambda b, *row: self._sequences(*row), query, key, value, slots)

    def _sequences(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, str]:
        """Attend whole sequences of one length."""
        policy, q_len = self.policy, query.shape[2]
        if not policy.settings.applies(q_len, key.shape[2]):
            return self._striped(query, key, value, policy.every)
        split = policy.split(key.shape[1])
        if split.static is None:
            return self._dynamic(query, key, value)
        heads, rest = split.heads(query.device)
        ratio = query.shape[1] // key.shape[1]
        groups, others = heads[::ratio] // ratio, rest[::ratio] // ratio
        out = torch.empty_like(query)
        out[:, heads], name = self._dynamic(query[:, heads], key[:, groups], value[:, groups])
        out[:, rest], static = self._striped(
            query[:, rest], key[:, others], value[:, others], split.static
        )
        return out, f"{name}, static {static}"

    def _dynamic(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, str]:
        out, ran = dynamic_attention(
            query,
            key,
            value,
            self.policy.settings,
            scale=self.scale,
            impl=self.impl,
            clock=self.tally.clock(query.device),
        )
        self.tally.add_pairs(self.kind, causal=ran.causal, shown=ran.shown, computed=ran.computed)
        return out, f"dynamic {ran.impl}"

    def _striped(
        self, query: Tensor, key: Tensor, value: Tensor, heads: HeadStripes
    ) -> tuple[Tensor, str]:
        mask = heads.on(query.device)
        impl = resolve(self.impl, query, key, value, mask)
        out = attention(query, key, value, mask, scale=self.scale, impl=impl)
        length = key.shape[2]
        sequences = ((length - query.shape[2], length),) * len(query)
        self.tally.add_stripes(self.kind, impl, heads.stripes, sequences)
        return out, impl
