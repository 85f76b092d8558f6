"""MInference's vertical-slash: columns and diagonals that the last rows look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from dynmask.baselines.amount import amount_of, check_amount
from dynmask.baselines.policy import Policy, Selector
from dynmask.masks import Stripes
from dynmask.ops.reference import accumulation_dtype


@dataclass(frozen=True)
class VerticalSlash(Policy):
    r"""Columns and offsets of most attention in the last rows, chosen for each query head.

    .. math::
        A = \operatorname{softmax}(\text{causal logits of the last rows}), \quad
        vertical_j = \sum_i A_{ij}, \quad slash_r = \sum_i A_{i, i - r}

    A row sees the columns of largest ``vertical``, the first ``sinks`` always among them, and the
    offsets of largest ``slash``, the nearest ``near`` always among them. Ties go to the earlier
    column and the smaller offset. With fewer columns than ``sinks``, or fewer offsets than
    ``near``, there are just these. Where all columns or all offsets are asked for, the call is
    plain causal attention.

    What earlier rows see depends on the last rows of the call. A chunk chooses anew, by its own
    last rows over all keys; single rows (decode) run dense.

    `Stripes` have no batch, and each sequence has columns of its own: calls of more than one row
    take one sequence.

    Args:
        vertical: Columns, a count or a share of the keys (a float), rounded up.
        slash: Offsets, likewise.
        last: Rows at the end of a call that choose; all of a shorter call.
        sinks: First keys that are always columns.
        near: Nearest distances that are always offsets, 0 (the own key) among them.

    Raises:
        ValueError: An amount is no count and no share, or ``last`` or ``near`` is under 1, or
            ``sinks`` under 0.

    Source: Jiang et al., MInference 1.0, arXiv 2407.02490. There every head has a pattern and
    amounts of its own, from a search; here all heads have one setting.
    """

    vertical: int | float = 1000
    slash: int | float = 6096
    last: int = 64
    sinks: int = 30
    near: int = 100

    name: ClassVar[str] = "vertical-slash"
    paper: ClassVar[str] = "2407.02490"
    selects: ClassVar[str] = "columns and diagonals of the last rows' attention"
    stages: ClassVar[tuple[str, ...]] = ("prefill",)

    def __post_init__(self) -> None:
        check_amount("vertical", self.vertical)
        check_amount("slash", self.slash)
        if self.last < 1 or self.near < 1 or self.sinks < 0:
            raise ValueError(
                f"need last >= 1, near >= 1 and sinks >= 0, got {self.last}, {self.near} and "
                f"{self.sinks}"
            )

    def selector(self, layer: int, layers: int) -> Selector:
        """Return the choice of any layer: the rule is one for all."""
        return _VerticalSlash(self)


class _VerticalSlash(Selector):
    remembers = False
    batched: ClassVar[bool] = False

    def __init__(self, settings: VerticalSlash):
        super().__init__()
        self._settings = settings

    def choose(
        self, q: Tensor, k: Tensor, state: Any, *, scale: float
    ) -> tuple[Stripes | None, None]:
        settings, k_len = self._settings, k.shape[2]
        if q.shape[2] == 1:
            return None, None
        if len(q) > 1:
            raise ValueError(
                f"q holds {len(q)} sequences, but vertical-slash chooses columns for one: call "
                "with one sequence at a time"
            )
        columns = max(amount_of(settings.vertical, k_len), settings.sinks)
        offsets = max(amount_of(settings.slash, k_len), settings.near)
        if columns >= k_len or offsets >= k_len:
            return None, None
        vertical: list[Tensor] = []
        slash: list[Tensor] = []
        # One kv head at a time: the rows' map is [H / G, last, K].
        for rows, keys in zip(q[0, :, -settings.last :].chunk(k.shape[1]), k[0], strict=True):
            weights = _attention_of_last_rows(rows, keys, scale)
            vertical += _top(weights.sum(1), columns, settings.sinks)
            slash += _top(_diagonal_sums(weights), offsets, settings.near)
        full = torch.zeros(q.shape[1], dtype=torch.bool, device=q.device)
        return Stripes(tuple(vertical), tuple(slash), full), None


def _attention_of_last_rows(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return ``[h, R, K]``: the attention of ``q [h, R, D]``, the last rows, to ``k [K, D]``."""
    work = accumulation_dtype(q.dtype)
    rows, k_len = q.shape[1], len(k)
    logits = (q.to(work) * scale) @ k.to(work).T
    causal = torch.ones(rows, k_len, dtype=torch.bool, device=q.device).tril(k_len - rows)
    return logits.masked_fill(~causal, float("-inf")).softmax(-1)


def _diagonal_sums(weights: Tensor) -> Tensor:
    """Return ``[h, K]``: the sum over rows of ``weights[h, R, K]`` at each distance."""
    heads, rows, k_len = weights.shape
    # Turned by half, row s holds distance r at s + r: the distances of a row are a window that
    # moves by one from row to row. No scattered sums, which on a GPU differ from run to run.
    turned = functional.pad(weights.flip(1, 2), (0, rows - 1))
    width = k_len + rows - 1
    windows = turned.as_strided((heads, rows, k_len), (rows * width, width + 1, 1))
    return windows.sum(1)


def _top(score: Tensor, count: int, always: int) -> tuple[Tensor, ...]:
    """Return for each head ``count`` positions, ascending: the first ``always``, then the best."""
    score = score.clone()
    score[:, :always] = float("inf")
    best = score.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return best.sort(-1).values.unbind()
