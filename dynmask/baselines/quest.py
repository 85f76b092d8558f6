"""Quest: pages of the cache, ranked for each decoded row by an upper bound of their logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dynmask.baselines.amount import amount_of, check_amount
from dynmask.baselines.policy import Policy, Selector
from dynmask.masks import Blocks
from dynmask.ops.reference import accumulation_dtype

_PAGE = 16


class _Pages(NamedTuple):
    """``low`` and ``high [B, G, P, D]`` of every complete page; ``budget`` in pages."""

    low: Tensor
    high: Tensor
    budget: int

    def extended(self, k: Tensor) -> _Pages:
        """Return these and the pages that ``k`` completes; these stay as they are."""
        known, complete = self.low.shape[2], k.shape[2] // _PAGE
        if known == complete:
            return self
        new = k[:, :, known * _PAGE : complete * _PAGE].unflatten(2, (-1, _PAGE))
        low, high = torch.cat([self.low, new.amin(3)], 2), torch.cat([self.high, new.amax(3)], 2)
        return self._replace(low=low, high=high)


class _TopPages(Selector):
    def __init__(self, budget: int | float):
        super().__init__()
        self._budget = budget

    def choose(
        self, q: Tensor, k: Tensor, state: _Pages | None, *, scale: float
    ) -> tuple[Blocks | None, _Pages]:
        batch, heads, q_len, dim = q.shape
        groups, k_len = k.shape[1], k.shape[2]
        if state is None:
            # A count may be more than the prompt has.
            is_count = isinstance(self._budget, int)
            budget = self._budget if is_count else amount_of(self._budget, k_len)
            state = _Pages(k[:, :, :0], k[:, :, :0], max(1, int(budget) // _PAGE))
        pages = state.extended(k)
        own = (k_len - 1) // _PAGE
        if q_len > 1 or own < pages.budget:
            return None, pages
        work = accumulation_dtype(q.dtype)
        row = q.to(work).reshape(batch, groups, -1, dim)
        low, high = (t[:, :, :own].to(work).transpose(2, 3) for t in (pages.low, pages.high))
        # The larger product is with the maximum where q is positive, else with the minimum.
        bound = row.clamp_min(0) @ high + row.clamp_max(0) @ low
        best = bound.view(batch, heads, 1, own).topk(pages.budget - 1, -1).indices.int()
        indices = torch.cat([best, best.new_full((batch, heads, 1, 1), own)], -1)
        counts = indices.new_full((batch, heads, 1), pages.budget)
        # One tile for all slots: nothing is spent on rows that are not there.
        return Blocks._trusted(indices, counts, block=_PAGE, tile=k_len), pages


class _Dense(Selector):
    remembers = False

    def choose(self, q: Tensor, k: Tensor, state: None, *, scale: float) -> tuple[None, None]:
        return None, None


@dataclass(frozen=True)
class Quest(Policy):
    r"""Each decoded row sees the pages of 16 keys that may hold the largest logits.

    A page's keys lie in a box, so no logit of a row in it exceeds

    .. math:: u = \sum_d \max(q_d \min_j k_{jd},\ q_d \max_j k_{jd})

    Every query head keeps the page that the row stands on, complete or not, and those with the
    largest ``u`` of the others, ``budget // 16`` pages in all. Nothing is evicted. Calls of several
    rows (the prefill, a question) and the first ``dense_layers`` layers run dense.

    Args:
        budget: Keys that a row sees: a count, or a share of the first call's keys (a float), fixed
            from then on; cut to whole pages, one at least.
        dense_layers: First layers that see everything.

    Raises:
        ValueError: ``budget`` is no count from 16 on and no share, or ``dense_layers`` under 0.

    Source: Tang et al., arXiv 2406.10774; the last page counts as one of the budget as in the
    authors' kernels.
    """

    budget: int | float = 1024
    dense_layers: int = 2

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "2406.10774"
    selects: ClassVar[str] = "pages of keys by an upper bound of their logits"
    stages: ClassVar[tuple[str, ...]] = ("decode",)

    def __post_init__(self) -> None:
        check_amount("budget", self.budget)
        if isinstance(self.budget, int) and self.budget < _PAGE:
            raise ValueError(f"budget={self.budget} must be a page at least, {_PAGE} keys")
        if self.dense_layers < 0:
            raise ValueError(f"dense_layers={self.dense_layers} must not be negative")

    def selector(self, layer: int, layers: int) -> Selector:
        """Return the choice of one layer: everything in the first ones."""
        return _Dense() if layer < self.dense_layers else _TopPages(self.budget)
