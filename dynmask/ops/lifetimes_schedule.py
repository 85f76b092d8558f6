"""Lifetimes cut into tiles of rows, each with the keys alive anywhere in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dynmask.masks import Lifetimes

# Rows of a tile, and the stacked rows beyond which a product gains nothing.
_TILES = (32, 64, 128, 256, 512)
_STACKED = 1024
# Costs in (query, key) pairs of a large product: the calls of a tile and kv head, a gathered key,
# and a pair that needs the mask.
_CALL = 60_000
_KEY = 20
_FENCED = 0.2
# Schedule entries alive at once.
_ENTRIES = 1 << 21


@dataclass(frozen=True, eq=False)
class Runs:
    """The visible keys and the rows that see them, counted from the call's first row.

    Attributes:
        owner: ``[A]`` int64, which row of the flat expiry ``[B * G, K]`` a key belongs to.
        slot: ``[A]`` int64, its slot.
        born: ``[A]`` int64, the first row that sees it.
        dies: ``[A]`` int64, one past the last row that sees it; above ``born``.
        begun: ``[B * G, Q]`` int64, how many keys are born up to each row.
        ended: ``[B * G, Q]`` int64, how many have died up to each row.
    """

    owner: Tensor
    slot: Tensor
    born: Tensor
    dies: Tensor
    begun: Tensor
    ended: Tensor

    @classmethod
    def build(cls, mask: Lifetimes, q_len: int) -> Runs:
        """Return the runs of the last ``q_len`` rows."""
        expiry = mask.expiry.flatten(0, 1)
        first = expiry.shape[1] - q_len
        slots = torch.arange(-first, q_len, dtype=torch.int32)
        born, dies = slots.clamp_min(0), (expiry - first).clamp_max(q_len)
        owner, slot = (dies > born).nonzero(as_tuple=True)
        begin, end = born[slot].long(), dies[owner, slot].long()
        owners = len(expiry)
        at = owner * (q_len + 1)
        begun = torch.bincount(at + begin, minlength=owners * (q_len + 1))
        ended = torch.bincount(at + end, minlength=owners * (q_len + 1))
        begun, ended = (t.view(owners, -1).cumsum(1)[:, :-1] for t in (begun, ended))
        return cls(owner, slot, begin, end, begun, ended)

    @property
    def owners(self) -> int:
        """``B * G``."""
        return self.begun.shape[0]

    @property
    def rows(self) -> int:
        """``Q``."""
        return self.begun.shape[1]

    def counts(self, size: int) -> Tensor:
        """Return ``[owners, tiles]`` int64: the keys alive anywhere in each tile."""
        tops = torch.arange(0, self.rows, size)
        last = (tops + size - 1).clamp_max(self.rows - 1)
        return self.begun[:, last] - self.ended[:, tops]

    def hollow(self, size: int) -> list[list[bool]]:
        """Return, by owner and tile, whether a row of the tile sees no key."""
        empty = functional.pad(self.begun == self.ended, (0, -self.rows % size))
        flags: list[list[bool]] = empty.unflatten(1, (-1, size)).any(-1).tolist()
        return flags

    def pairs(self, size: int) -> Tensor:
        """Return ``[owners]`` int64: the pairs that tiles of ``size`` rows compute per head."""
        tops = torch.arange(0, self.rows, size)
        return (self.counts(size) * (self.rows - tops).clamp_max(size)).sum(-1)

    def cost(self, size: int, ratio: int) -> float:
        """Return the cost of all owners in dense pairs, for ``ratio`` query heads each."""
        counts = self.counts(size)
        keys = int(counts.sum())
        # A key is masked in the tiles of its birth and its death at most.
        fenced = _FENCED * min(2 * len(self.slot), keys)
        size = min(size, self.rows)
        return _CALL * counts.numel() + _KEY * keys + size * (ratio * keys + fenced)

    def best(self, ratio: int) -> tuple[int, float]:
        """Return the cheapest tile and its cost."""
        sizes = [t for t in _TILES if t * ratio <= _STACKED] or [_TILES[0]]
        cost, size = min((self.cost(t, ratio), t) for t in sizes)
        return size, cost


@dataclass(frozen=True, eq=False)
class Tile:
    """Rows ``top`` to ``last - 1`` of one owner and their keys.

    Attributes:
        owner: Row of the flat expiry.
        top: First row, from the call's first.
        last: One past the last row.
        slots: ``[U]`` int64; the keys that all rows see come first.
        whole: How many keys all rows see.
        fence: ``[last - top, U - whole]``: +inf where the row sees the key, else -inf.
    """

    owner: int
    top: int
    last: int
    slots: Tensor
    whole: int
    fence: Tensor


def tiles(runs: Runs, size: int, work: torch.dtype) -> Iterator[Tile]:
    """Yield the tiles that see any key, as many as memory allows scheduled at once."""
    total = runs.counts(size).sum(0).cumsum(0)
    rows = torch.arange(size, dtype=work)[:, None]
    begin = 0
    while begin < len(total):
        limit = _ENTRIES + (int(total[begin - 1]) if begin else 0)
        end = max(begin + 1, int((total <= limit).sum()))
        yield from _section(runs, size, begin, end, rows)
        begin = end


def _section(runs: Runs, size: int, begin: int, end: int, rows: Tensor) -> Iterator[Tile]:
    """Yield the tiles number ``begin`` to ``end - 1`` of every owner."""
    low = (runs.born // size).clamp_min(begin)
    high = ((runs.dies - 1) // size).clamp_max(end - 1)
    count = (high - low + 1).clamp_min(0)
    # One entry per key and tile, then brought into the order: owner, tile, whole keys first.
    key = torch.repeat_interleave(count)
    tile = torch.arange(len(key)) + (low - count.cumsum(0) + count)[key]
    top = tile * size
    partial = (runs.born[key] > top) | (runs.dies[key] < (top + size).clamp_max(runs.rows))
    bucket = ((runs.owner[key] * (end - begin) + tile - begin) * 2 + partial).int()
    bucket, order = bucket.sort(stable=True)
    key = key[order]
    slots, births, deaths = (t[key] for t in (runs.slot, runs.born, runs.dies))
    buckets = 2 * runs.owners * (end - begin)
    ends = torch.bincount(bucket, minlength=buckets).cumsum(0).tolist()
    start = 0
    for number in range(0, buckets, 2):
        middle, stop = ends[number : number + 2]
        if start < stop:
            owner, at = divmod(number // 2, end - begin)
            first = (begin + at) * size
            last = min(first + size, runs.rows)
            # A row sees a key where both factors are positive; halves, so that none is 0.
            born = (births[middle:stop] - first).to(rows.dtype) - 0.5
            dies = (deaths[middle:stop] - first).to(rows.dtype) - 0.5
            inside = rows[: last - first]
            fence = (inside - born).mul_(dies - inside).mul_(torch.inf)
            yield Tile(owner, first, last, slots[start:stop], middle - start, fence)
        start = stop
