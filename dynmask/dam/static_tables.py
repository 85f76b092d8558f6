"""Stripes as tables: what a row sees of keys that stand anywhere, and which row sees a key last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmask.masks import Stripes

NOWHERE = 2**30
"""Position of what is no key: behind every row, and differences still fit int32."""


@dataclass(frozen=True, eq=False)
class LastRows:
    """The last row that sees a key, in any query head of its kv head. On the CPU.

    Attributes:
        first: ``[G, T]`` int32, of the keys at positions below ``T``; `NOWHERE` for a column.
        reach: ``[G]`` int32, largest offset: a later key at ``p`` is seen last by ``p + reach``.
    """

    first: Tensor
    reach: Tensor

    @classmethod
    def of(cls, stripes: Stripes, groups: int) -> LastRows:
        """Return those of ``groups`` kv heads, kept with the stripes."""
        key = "last rows", groups
        if key not in stripes.derived:
            stripes.derived[key] = cls._build(stripes, groups)
        found: LastRows = stripes.derived[key]
        return found

    @classmethod
    def _build(cls, stripes: Stripes, groups: int) -> LastRows:
        reach = torch.stack([o[-1] for o in stripes.offsets]).int()
        size = 0 if stripes.corner is None else stripes.corner.shape[1]
        count = max([1, size, *(int(c[-1]) + 1 for c in stripes.columns if len(c))])
        first = torch.arange(count, dtype=torch.int32, device=stripes.device) + reach[:, None]
        if stripes.corner is not None and size:
            # argmax finds the first of equals, so the rows are turned around.
            last = size - 1 - stripes.corner.flip(1).byte().argmax(1).int()
            last = last.masked_fill_(~stripes.corner.any(1), -1)
            first[:, :size] = torch.maximum(first[:, :size], last)
        for head, columns in enumerate(stripes.columns):
            first[head, columns] = NOWHERE
        return cls(
            first.view(groups, -1, count).amax(1).cpu(), reach.view(groups, -1).amax(1).cpu()
        )

    def see(self, position: Tensor, row: Tensor) -> Tensor:
        """Tell which keys are seen by any row from ``row`` on.

        Args:
            position: ``[B, G, n]`` int32 on the CPU.
            row: ``[B]`` int32.

        Returns:
            ``[B, G, n]`` bool, False where there is no key.
        """
        last = position + self.reach[:, None]
        count = self.first.shape[1]
        group = torch.arange(len(self.first))[:, None]
        known = self.first[group, position.clamp_max(count - 1)]
        last = torch.where(position < count, known, last)
        return (last >= row[:, None, None]) & (position != NOWHERE)


@dataclass(frozen=True, eq=False)
class RowTables:
    """Which columns and offsets each head has, by position and by distance.

    Attributes:
        columns: ``[H, C + 1]`` bool, ``C`` beyond all columns.
        offsets: ``[H, R + 2]`` bool, ``R`` the largest offset; its last entry, also -1, is False.
        head: ``[G, H / G, 1, 1]`` int64, numbers of the heads.
    """

    columns: Tensor
    offsets: Tensor
    head: Tensor

    @classmethod
    def of(cls, stripes: Stripes, groups: int, device: torch.device) -> RowTables:
        """Return those on ``device``, kept with the stripes."""
        key = "row tables", groups, device
        if key not in stripes.derived:
            head = torch.arange(stripes.heads).view(groups, -1, 1, 1)
            columns, offsets = _flags(stripes.columns), _flags(stripes.offsets)
            stripes.derived[key] = cls(*(t.to(device) for t in (columns, offsets, head)))
        found: RowTables = stripes.derived[key]
        return found

    def in_columns(self, position: Tensor) -> Tensor:
        """Return ``[B, G, H / G, S]``: which keys at ``position [B, G, S]`` are columns."""
        column = position.clamp_max(self.columns.shape[1] - 1)
        return self.columns[self.head[..., 0], column[:, :, None]]

    def seen(self, rows: Tensor, position: Tensor, in_columns: Tensor) -> Tensor:
        """Return ``[B, G, H / G, Q, S]``, what rows see by columns and offsets.

        Args:
            rows: ``[B, Q]`` int32, the rows' positions.
            position: ``[B, G, S]`` int32, of which none is behind a lone row but `NOWHERE`.
            in_columns: ``[B, G, H / G, S]``, of these keys.
        """
        # -1 and the largest distance are no offsets of any head.
        distance = (rows[:, None, :, None] - position[:, :, None]).clamp_(
            -1, self.offsets.shape[1] - 1
        )
        seen = self.offsets[self.head, distance[:, :, None]]
        columns = in_columns[:, :, :, None]
        if rows.shape[1] > 1:
            columns = columns & (distance >= 0)[:, :, None]
        return seen.logical_or_(columns)


def in_corner(corner: Tensor, head: Tensor, rows: Tensor, position: Tensor) -> Tensor:
    """Return ``[B, G, H / G, Q, S]``, what rows see by the corner; arguments as above."""
    size = corner.shape[1]
    rows, position = rows[:, None, None, :, None], position[:, :, None, None]
    found = corner[head, rows.clamp_max(size - 1), position.clamp_max(size - 1)]
    return found & (rows < size) & (position < size)


def _flags(positions: tuple[Tensor, ...]) -> Tensor:
    """Return ``[H, n]`` bool on the CPU, with a last entry that is False for all."""
    lists = [p.tolist() for p in positions]
    flags = torch.zeros(len(lists), max((p[-1] + 2 for p in lists if p), default=1)).bool()
    for row, of_head in zip(flags, lists, strict=True):
        row[of_head] = True
    return flags
