"""How one head's stripes are cut into dense pieces that a matrix product can run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dynmask.masks.stripes import Stripes

# Rows of a tile, and the time of a (query, key) pair in a band of that tile relative to a pair of
# a dense kernel: small products use the cores less well.
_TILES = ((32, 1.4), (64, 1.2), (128, 1.1), (256, 1.05))
# A pair of a lone offset is one row product: no reuse, so slower than a dense pair.
_LONE_PAIR = 8.0
# What one more band costs in calls, in pairs per row.
_BAND = 16.0
# Logits of a chunk: enough for a few large products, few enough for the shared cache.
_CHUNK_CELLS = 1 << 21
_CHUNK_ROWS = 512


@dataclass(frozen=True)
class Chunk:
    """Rows ``row`` to ``row + rows - 1`` and the pieces that they run.

    Attributes:
        row: First row.
        rows: Number of rows, a multiple of the tile; may reach past the sequence's end.
        columns: How many of the head's columns the chunk's last real row sees.
        bands: ``(low, high)`` offsets, cut to those that any row of the chunk reaches.
    """

    row: int
    rows: int
    columns: int
    bands: tuple[tuple[int, int], ...]

    def width(self, tile: int) -> int:
        """Return the logits per row, lone offsets aside."""
        return self.columns + sum(tile + high - low - 1 for low, high in self.bands)


@dataclass(frozen=True, eq=False)
class HeadSchedule:
    """One head's columns and offsets, the offsets split into bands and lone ones.

    A band ``(low, high)`` is run for a tile of ``T`` rows at once, over the ``T + high - low - 1``
    keys that any of them reaches; pairs whose offset is not in the mask are masked. A lone offset
    is run as a row-wise product. Which is which, and the tile, is the cheapest by a cost in units
    of a dense kernel's pairs.

    Attributes:
        columns: ``[C]`` int64 on the CPU.
        tile: Rows per tile.
        bands: ``(low, high)`` with ``low <= offset < high``, ascending.
        lone: Offsets outside of every band.
        fences: Per band ``[2 T + high - low - 2]`` float32, 0 where the offset
            ``T + high - 2 - x`` is in the mask, else -inf: row ``t`` of a tile adds the window
            that starts at ``T - 1 - t`` to its logits.
        solid: Per band, whether all of its offsets are in the mask.
    """

    columns: Tensor
    tile: int
    bands: tuple[tuple[int, int], ...]
    lone: tuple[int, ...]
    fences: tuple[Tensor, ...]
    solid: tuple[bool, ...]

    @classmethod
    def build(cls, columns: Tensor, offsets: Tensor) -> HeadSchedule:
        """Split the offsets at the least cost.

        Args:
            columns: ``[C]`` sorted int64.
            offsets: ``[R]`` sorted int64.
        """
        columns, offsets = columns.cpu(), offsets.cpu()
        runs = _runs(offsets)
        plans = [(*_split(runs, tile, pair), tile) for tile, pair in _TILES]
        _, in_band, tile = min(plans, key=lambda plan: plan[0])
        bands: list[tuple[int, int]] = []
        lone: list[int] = []
        for (low, high), banded in zip(runs, in_band, strict=True):
            if banded == "lone":
                lone += range(low, high)
            elif banded == "join":
                bands[-1] = (bands[-1][0], high)
            else:
                bands.append((low, high))
        fences, solid = [], []
        for low, high in bands:
            fence = torch.full((2 * tile + high - low - 2,), float("-inf"))
            inside = offsets[(offsets >= low) & (offsets < high)]
            fence[tile + high - 2 - inside] = 0
            fences.append(fence)
            solid.append(len(inside) == high - low)
        return cls(columns, tile, tuple(bands), tuple(lone), tuple(fences), tuple(solid))

    @property
    def reach(self) -> int:
        """How many keys before a row the bands and lone offsets may touch."""
        return max([high - 1 for _, high in self.bands] + list(self.lone))

    def chunks(self, first: int, last: int) -> Iterator[Chunk]:
        """Cut rows ``first`` to ``last - 1`` into chunks; the last one may reach past ``last``."""
        row = first
        while row < last:
            left = -(-(last - row) // self.tile)
            rows = min(left, max(1, _CHUNK_ROWS // self.tile)) * self.tile
            chunk = self._chunk(row, rows, last)
            fit = _CHUNK_CELLS // max(1, chunk.width(self.tile)) // self.tile * self.tile
            if fit < rows and rows > self.tile:
                chunk = self._chunk(row, max(self.tile, fit), last)
            yield chunk
            row += chunk.rows

    def _chunk(self, row: int, rows: int, last: int) -> Chunk:
        end = min(row + rows, last)
        return Chunk(
            row=row,
            rows=rows,
            columns=int(torch.searchsorted(self.columns, end)),
            bands=tuple((low, min(high, end)) for low, high in self.bands if low < end),
        )

    def computed_pairs(self, first: int, last: int) -> int:
        """Count the pairs evaluated for rows ``first`` to ``last - 1``, masked ones included."""
        pairs = (last - first) * len(self.lone)
        return pairs + sum(c.rows * c.width(self.tile) for c in self.chunks(first, last))

    def cost(self, first: int, last: int) -> float:
        """Return the time of rows ``first`` to ``last - 1`` in dense pairs."""
        pair = dict(_TILES)[self.tile]
        cost = (last - first) * len(self.lone) * _LONE_PAIR
        for chunk in self.chunks(first, last):
            in_bands = chunk.width(self.tile) - chunk.columns
            cost += chunk.rows * (chunk.columns + pair * in_bands)
        return cost


def head_schedule(mask: Stripes, head: int) -> HeadSchedule:
    """Return head ``head``'s schedule, built once per mask."""
    key = ("schedule", head)
    if key not in mask.derived:
        mask.derived[key] = HeadSchedule.build(mask.columns[head], mask.offsets[head])
    schedule: HeadSchedule = mask.derived[key]
    return schedule


@dataclass(frozen=True)
class Sequence:
    """One batch row without its padding.

    Attributes:
        start: Key slot of its first token.
        first: Position of its first query row.
        length: Number of its tokens; its query rows are ``first`` to ``length - 1``.
    """

    start: int
    first: int
    length: int


def sequences(mask: Stripes, q_len: int, k_len: int) -> list[Sequence]:
    """Return the sequence of each batch row; one in all without padding."""
    runs = [(0, k_len)] if mask.padding is None else mask.padding.runs(k_len)
    return [
        Sequence(start, min(max(k_len - q_len, start), stop) - start, stop - start)
        for start, stop in runs
    ]


def _runs(offsets: Tensor) -> list[tuple[int, int]]:
    """Return the runs ``(low, high)`` of consecutive offsets."""
    breaks = (offsets.diff() > 1).nonzero().flatten() + 1
    parts = torch.tensor_split(offsets, breaks.tolist())
    return [(int(p[0]), int(p[-1]) + 1) for p in parts if len(p)]


def _split(runs: list[tuple[int, int]], tile: int, pair: float) -> tuple[float, list[str]]:
    """Choose ``new`` band, ``join`` the band before, or ``lone`` for each run, at the least cost.

    Two-state Viterbi: cost so far when the last run is lone, and when it ends a band.
    """
    lone_cost, band_cost = 0.0, float("inf")
    steps: list[tuple[str, bool]] = []  # per run: the best state before it, and whether it joins
    for at, (low, high) in enumerate(runs):
        before = "lone" if lone_cost <= band_cost else "band"
        least = min(lone_cost, band_cost)
        new = least + _BAND + pair * (high - low + tile - 1)
        join = band_cost + pair * (high - runs[at - 1][1]) if at else float("inf")
        steps.append((before, join < new))
        lone_cost, band_cost = least + _LONE_PAIR * (high - low), min(join, new)
    state = "lone" if lone_cost <= band_cost else "band"
    ways: list[str] = []
    for before, joins in reversed(steps):
        if state == "band" and joins:
            ways.append("join")
            continue
        ways.append("lone" if state == "lone" else "new")
        state = before
    return min(lone_cost, band_cost), ways[::-1]
