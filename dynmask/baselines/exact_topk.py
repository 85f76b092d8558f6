"""Exact top-k: each row's largest logits, the oracle of every method that picks keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynmask.baselines.amount import amount_of, check_amount
from dynmask.baselines.policy import Policy, Selector
from dynmask.masks import Blocks
from dynmask.ops.reference import accumulation_dtype

# Logits alive at once; 2^24 float32 are 64 MiB.
_CELLS = 1 << 24


@dataclass(frozen=True)
class TopK(Policy):
    """For every row and query head the ``keep`` largest logits, ties to the earlier key.

    The choice sees every logit, so it saves no time: it says how well so many keys could do. The
    own key has no special place. A row with at most ``keep`` keys sees them all. Chunks and
    single rows choose as the same rows of a prefill do, if ``keep`` is a count; a share is one of
    the keys at the end of the call, and so of a prefill's density about ``keep (2 - keep)``.

    Memory: ``[B, H, K, keep]`` int32 lists, for a single row ``[B, H, 1, keep]``, and a part
    of the logits.

    Args:
        keep: Keys of a row, a count or a share of the call's ``K`` keys (a float), rounded up.

    Raises:
        ValueError: ``keep`` is no count and no share.

    Source: the oracle of many papers; Gupta et al., Memory-efficient Transformers via Top-k
    Attention, arXiv 2106.06899.
    """

    keep: int | float = 1024

    name: ClassVar[str] = "topk"
    paper: ClassVar[str] = "2106.06899"
    selects: ClassVar[str] = "each row's largest logits"
    stages: ClassVar[tuple[str, ...]] = ("prefill", "decode")

    def __post_init__(self) -> None:
        check_amount("keep", self.keep)

    def selector(self, layer: int, layers: int) -> Selector:
        """Return the choice of any layer: the rule is one for all."""
        return _TopK(self.keep)


class _TopK(Selector):
    remembers = False

    def __init__(self, keep: int | float):
        super().__init__()
        self._keep = keep

    def choose(
        self, q: Tensor, k: Tensor, state: Any, *, scale: float
    ) -> tuple[Blocks | None, None]:
        q_len, k_len = q.shape[2], k.shape[2]
        keep = amount_of(self._keep, k_len)
        if keep >= k_len:
            return None, None
        # One row is one tile: its list serves, whatever the slots before it.
        tile = k_len if q_len == 1 else 1
        tiles = k_len // tile
        lists = torch.zeros(*q.shape[:2], tiles, keep, dtype=torch.int32, device=q.device)
        _fill(lists[:, :, tiles - q_len :], q, k, scale)
        counts = (torch.arange(1, tiles + 1, device=q.device) * tile).clamp_max(keep).int()
        counts[: tiles - q_len] = 0  # Slots before the call have no list.
        counts = counts.expand(lists.shape[:3])
        # Checking the mask would sort all lists.
        return Blocks._trusted(lists, counts, block=1, tile=tile), None


def _fill(lists: Tensor, q: Tensor, k: Tensor, scale: float) -> None:
    """Write the keys of each row's largest logits to ``lists [B, H, Q, keep]``, best first.

    A row of fewer keys has what is left of its list filled with keys after it.
    """
    batch, heads, q_len, dim = q.shape
    groups, k_len = k.shape[1:3]
    keep = lists.shape[3]
    keys = k.to(accumulation_dtype(q.dtype))
    key = torch.arange(k_len, device=q.device)
    at_once = max(1, _CELLS // (batch * heads * k_len))
    for top in range(0, q_len, at_once):
        rows = q[:, :, top : top + at_once].to(keys.dtype) * scale
        count = rows.shape[2]
        # The query heads of a group are stacked as rows, so keys are never repeated.
        logits = rows.reshape(batch, groups, -1, dim) @ keys.transpose(2, 3)
        logits = logits.view(batch, heads, count, k_len)
        own = torch.arange(k_len - q_len + top, k_len - q_len + top + count, device=q.device)
        logits = logits.masked_fill(key > own[:, None], float("-inf"))
        lists[:, :, top : top + count] = _best(logits.flatten(0, 2), keep).view(
            batch, heads, count, keep
        )


def _best(logits: Tensor, keep: int) -> Tensor:
    """Return ``[R, keep]`` int32: the places of the largest of each row, ties to the earlier.

    A row has more logits than ``keep``.
    """
    value, index = logits.topk(keep + 1)
    index = index[:, :keep].int()
    # Torch takes any of equal values. Only where the last one that is kept has an equal that is
    # not does it matter which: those rows are sorted.
    least, next_one = value[:, keep - 1], value[:, keep]
    rows = ((least == next_one) & (least > float("-inf"))).nonzero().flatten()
    if len(rows):
        order = logits[rows].sort(dim=-1, descending=True, stable=True).indices
        index[rows] = order[:, :keep].int()
    return index
