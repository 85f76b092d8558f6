"""Top-p: for each row as few keys as hold a share of its attention (Twilight)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dynmask.baselines.policy import Policy, Selector
from dynmask.masks import Blocks
from dynmask.ops.reference import accumulation_dtype

# Logits alive at once, with their order as int64.
_CELLS = 1 << 23


class _Nucleus(Selector):
    def __init__(self, p: float, bits: int | None):
        super().__init__()
        self._p = p
        self._bits = bits
        self.remembers = bits is not None

    def choose(
        self, q: Tensor, k: Tensor, state: Tensor | None, *, scale: float
    ) -> tuple[Blocks | None, Tensor | None]:
        if self._p == 1:
            return None, None
        keys = k
        if self._bits is not None:
            known = 0 if state is None else state.shape[2]
            new = quantised(k[:, :, known:], self._bits)
            keys = state = new if state is None else torch.cat([state, new], 2)
        batch, heads, q_len, _ = q.shape
        k_len = k.shape[2]
        at_once = max(1, _CELLS // (batch * heads * k_len))
        parts = []
        for top in range(0, q_len, at_once):
            rows = q[:, :, top : top + at_once]
            end = k_len - q_len + top + rows.shape[2]
            parts.append(_fewest(rows, keys[:, :, :end], self._p, scale))
        # One row is one tile: its list serves, whatever the slots before it.
        tile = k_len if q_len == 1 else 1
        tiles = k_len // tile
        most = max(lists.shape[3] for lists, _ in parts)
        indices = torch.zeros(batch, heads, tiles, most, dtype=torch.int32, device=q.device)
        counts = torch.zeros(batch, heads, tiles, dtype=torch.int32, device=q.device)
        counts[:, :, tiles - q_len :] = torch.cat([count for _, count in parts], 2)
        at = tiles - q_len
        for lists, _ in parts:
            indices[:, :, at : at + lists.shape[2], : lists.shape[3]] = lists
            at += lists.shape[2]
        return Blocks._trusted(indices, counts, block=1, tile=tile), state


def _fewest(q: Tensor, k: Tensor, p: float, scale: float) -> tuple[Tensor, Tensor]:
    """Return ``[B, H, Q, M]`` int32 keys of each row and ``[B, H, Q]`` how many of them it needs.

    Rows stand at the last slots. Waits for the device, to learn the longest list.
    """
    batch, heads, q_len, dim = q.shape
    groups, k_len = k.shape[1], k.shape[2]
    work = accumulation_dtype(q.dtype)
    logits = q.to(work).reshape(batch, groups, -1, dim) @ k.to(work).transpose(2, 3)
    logits = logits.view(batch, heads, q_len, k_len) * scale
    row = torch.arange(k_len - q_len, k_len, device=q.device)
    logits.masked_fill_(torch.arange(k_len, device=q.device) > row[:, None], -torch.inf)
    weight, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    # A key is needed if those before it hold less than p. Rounding must not add later keys.
    more = weight.cumsum(-1)[..., :-1] < p
    count = torch.minimum(more.sum(-1) + 1, row + 1).int()
    return order[..., : int(count.max())].int(), count


def quantised(k: Tensor, bits: int) -> Tensor:
    r"""Round each key to ``2 ** bits`` levels between its least and its largest element.

    .. math:: \hat k_d = \min k + s \operatorname{round}((k_d - \min k) / s), \quad
        s = (\max k - \min k) / (2^{bits} - 1)

    Args:
        k: ``[..., D]``.
        bits: Of a level.

    Returns:
        The rounded keys in k's dtype and shape.
    """
    exact = k.to(accumulation_dtype(k.dtype))
    least = exact.amin(-1, keepdim=True)
    step = (exact.amax(-1, keepdim=True) - least) / (2**bits - 1)
    # All elements alike are one level, whatever the step.
    level = ((exact - least) / step.where(step > 0, 1)).round()
    return (least + level * step).to(k.dtype)


@dataclass(frozen=True)
class TopP(Policy):
    """Every row and query head sees the fewest keys that hold ``p`` of its attention.

    The attention is estimated: from keys rounded to ``bits`` bits each, with a scale and a zero of
    their own for each token and kv head. A row sees those of largest estimated weight, as few as
    sum to ``p``; the own key has no special place. What a row sees does not depend on how tokens
    are split into calls.

    The paper prunes so in decode, what another method chose (Quest, say); here all keys are
    candidates, in the prefill too. The estimate looks at every pair, so in plain torch it saves no
    time: it says how few keys are enough.

    Memory: ``[B, H, K, M]`` int32 lists, where ``M`` is the longest; for a single row
    ``[B, H, 1, M]``. And the rounded keys, as many as the keys.

    Args:
        p: Share of the attention, in (0, 1]; 1 is everything.
        bits: Of the rounded keys, 1 to 8; None for exact ones.

    Raises:
        ValueError: A value is out of its range.

    Source: Lin et al., Twilight, arXiv 2502.02770.
    """

    p: float = 0.9
    bits: int | None = 4

    name: ClassVar[str] = "top-p"
    paper: ClassVar[str] = "2502.02770"
    selects: ClassVar[str] = "as few keys as hold a share of the attention"
    stages: ClassVar[tuple[str, ...]] = ("prefill", "decode")

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p={self.p} must be above 0 and at most 1")
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be 1 to 8, or None for exact keys")

    def selector(self, layer: int, layers: int) -> Selector:
        """Return the choice of any layer: all are alike."""
        return _Nucleus(self.p, self.bits)
