"""Measure how much attention a head's stripes keep on texts they were not made from."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from dynmask.masks import Stripes

#: Share of the rows, the worst ones, that `Coverage.tail` averages.
TAIL = 0.1


class Coverage(NamedTuple):
    """Shares of attention kept, each `[H]` float32 on the CPU, in [0, 1].

    `mean` and `tail` are of columns and offsets alone, in rows at positions `>= L`: there nothing
    else rules, and there inputs longer than the capture length are won or lost. If no held-out text
    is longer than L tokens, they are of the rows in the second half of each text instead; that
    flatters the stripes, since all columns lie near.

    Attributes:
        mean: Mean over these rows. The gate reads this.
        tail: Mean over the worst tenth of these rows.
        corner_mean: Mean over the rows at positions `< L`, with the captured corner as well.
    """

    mean: Tensor
    tail: Tensor
    corner_mean: Tensor


class CoverageMeter:
    """Running coverage of one layer's stripes on rows of held-out attention maps.

    The coverage of row i is `sum_j P[i, j] mask[i, j] / sum_j P[i, j]`; a row without attention
    counts as kept. Every row has the same weight. Memory: 4 H bytes a row, and the mask of the rows
    that are added, `[H, R, N]` bool.

    Args:
        stripes: The layer's stripes without padding; `full_heads` count as they are.
        capture_length: L, the side of the captured corner.
        device: Where the maps are; probabilities are moved there.
    """

    def __init__(
        self,
        stripes: Stripes,
        *,
        capture_length: int,
        device: torch.device | str | None = None,
    ) -> None:
        self._device = torch.device("cpu" if device is None else device)
        self._with_corner = stripes.to(self._device)
        self._alone = dataclasses.replace(self._with_corner, corner=None)
        self._length = capture_length
        self._beyond: list[Tensor] = []
        self._late: list[Tensor] = []
        self._corner: list[Tensor] = []

    def add(self, probs: Tensor, rows: Tensor) -> None:
        """Add rows of one held-out text's attention maps.

        Args:
            probs: `[H, R, N]` probabilities of a text of N tokens, any N.
            rows: `[R]` int64, the position of each row, in `[0, N)`.

        Raises:
            ValueError: Shapes do not fit, or a row holds NaN.
        """
        heads, size = self._alone.heads, probs.shape[-1]
        if probs.ndim != 3 or probs.shape[:2] != (heads, rows.numel()):
            raise ValueError(
                f"probs must be [{heads}, {rows.numel()}, N], one row for each of rows, got"
                f" {list(probs.shape)}"
            )
        probs_HRN = probs.detach().to(self._device, torch.float32)
        rows = rows.to(self._device)
        whole_HR = probs_HRN.sum(-1)
        if whole_HR.isnan().any():
            raise ValueError("probs holds NaN; check the model's weights")

        def shares(stripes: Stripes, which: Tensor) -> Tensor:
            mask_HRN = stripes.rows(rows[which], size)
            kept_HR = (probs_HRN[:, which] * mask_HRN).sum(-1)
            return torch.where(whole_HR[:, which] > 0, kept_HR / whole_HR[:, which], 1.0).cpu()

        self._corner.append(shares(self._with_corner, rows < self._length))
        if size > self._length:
            self._beyond.append(shares(self._alone, rows >= self._length))
        else:
            self._late.append(shares(self._alone, 2 * rows >= size))

    def result(self) -> Coverage:
        """Return the coverage of all rows so far.

        Raises:
            ValueError: No row was added, or none at a position `< L`.
        """
        parts = self._beyond or self._late
        if not parts or not any(part.numel() for part in parts):
            raise ValueError("no held-out rows: raise holdout or give more texts")
        alone_HR, corner_HR = torch.cat(parts, -1).double(), torch.cat(self._corner, -1).double()
        if corner_HR.numel() == 0:
            raise ValueError(f"no held-out rows below capture_length={self._length}")
        worst = math.ceil(TAIL * alone_HR.shape[-1])
        tail_H = alone_HR.topk(worst, dim=-1, largest=False).values.mean(-1)
        # Rounding may carry a full row a hair past 1.
        shares = (alone_HR.mean(-1), tail_H, corner_HR.mean(-1))
        return Coverage(*(share.clamp(0, 1).float() for share in shares))
