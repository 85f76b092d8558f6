"""Measure how much attention a head's stripes keep on texts they were not made from."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from dynmask.dam.capture import texts_of
from dynmask.masks import Stripes

#: Share of the rows, the worst ones, that `Coverage.tail` averages.
TAIL = 0.1


class Coverage(NamedTuple):
    """Shares of attention kept, each `[H]` float32 on the CPU, in [0, 1].

    Attributes:
        mean: Mean over rows, columns and offsets alone: what holds beyond the captured corner.
        tail: Mean over the worst tenth of the rows, columns and offsets alone. The gate reads
            this: a static mask fails on the few rows that look far back, and the mean hides them.
        corner_mean: Mean over rows with the captured corner as well.
    """

    mean: Tensor
    tail: Tensor
    corner_mean: Tensor


class CoverageMeter:
    """Running coverage of one layer's stripes on held-out attention maps.

    The coverage of row i is `sum_j P[i, j] mask[i, j] / sum_j P[i, j]`; a row without attention
    counts as kept. Every row has the same weight. Memory: the row shares, 4 H bytes a row and
    kind, and two `[H, N, N]` bool masks for the longest text.

    Args:
        stripes: The layer's stripes without padding; `full_heads` count as they are.
        device: Where the maps are; probabilities are moved there.
    """

    def __init__(self, stripes: Stripes, *, device: torch.device | str | None = None) -> None:
        self._device = torch.device("cpu" if device is None else device)
        self._with_corner = stripes.to(self._device)
        self._alone = dataclasses.replace(self._with_corner, corner=None)
        heads = len(stripes.columns)
        self._masks: tuple[Tensor, Tensor] = (
            torch.zeros(heads, 0, 0, dtype=torch.bool, device=self._device),
        ) * 2
        self._rows: tuple[list[Tensor], list[Tensor]] = ([], [])

    def add(self, probs: Tensor, start: Tensor, stop: Tensor) -> None:
        """Add a batch of held-out attention maps.

        Args:
            probs: `[B, H, T, T]` probabilities, any T, also beyond the capture length.
            start: `[B]` integers, each row's first real token.
            stop: `[B]` integers, one past each row's last real token.

        Raises:
            ValueError: Shapes do not fit, or a map holds NaN.
        """
        for text in texts_of(probs, start, stop, heads=len(self._masks[0])):
            text_HNN = text.detach().to(self._device, torch.float32)
            size = text_HNN.shape[-1]
            if size > self._masks[0].shape[-1]:
                # Positions count from the first token, so a shorter text sees a part of the mask.
                self._masks = (self._alone.dense(size)[0], self._with_corner.dense(size)[0])
            whole_HN = text_HNN.sum(-1)
            if whole_HN.isnan().any():
                raise ValueError("probs holds NaN in a real row; check the model's weights")
            for mask_HNN, rows in zip(self._masks, self._rows, strict=True):
                kept_HN = (text_HNN * mask_HNN[:, :size, :size]).sum(-1)
                rows.append(torch.where(whole_HN > 0, kept_HN / whole_HN, 1.0).cpu())

    def result(self) -> Coverage:
        """Return the coverage of all rows so far.

        Raises:
            ValueError: No row was added.
        """
        if not self._rows[0]:
            raise ValueError("no held-out rows: raise holdout or give more texts")
        alone_HR, corner_HR = (torch.cat(rows, -1).double() for rows in self._rows)
        worst = math.ceil(TAIL * alone_HR.shape[-1])
        tail_H = alone_HR.topk(worst, dim=-1, largest=False).values.mean(-1)
        # Rounding may carry a full row a hair past 1.
        shares = (alone_HR.mean(-1), tail_H, corner_HR.mean(-1))
        return Coverage(*(share.clamp(0, 1).float() for share in shares))
