"""Choose, for each tile of query rows, the key blocks that a summary would not do for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynmask.dam.dynamic_cost import summary_costs
from dynmask.dam.dynamic_keys import Keys
from dynmask.dam.keep import keep
from dynmask.dam.kernels import by_kernels
from dynmask.masks import Blocks

if TYPE_CHECKING:
    from dynmask.dam.dynamic import Dynamic


@dataclass(frozen=True, eq=False)
class Choice:
    """What the tiles of some rows see, see `dynmask.dam.dynamic.Dynamic`.

    Attributes:
        kept: ``[B, G, T, N]`` bool: the tile sees the block key by key, not its summary; False for
            blocks that are not far, which it sees key by key anyway.
        far: ``[T]`` int64: how many blocks are far, the first ones.
        top: The first tile, in tiles from position 0.
        tile: Rows of a tile.
        block: Keys of a block.
        near: Keys before a tile's first row that are not far, at least.
    """

    kept: Tensor
    far: Tensor
    top: int
    tile: int
    block: int
    near: int

    def shown_pairs(self, first: int, last: int) -> Tensor:
        """Count ``[]`` int64 (query, key) pairs of rows ``first`` to ``last - 1``, kv heads once.

        A summary counts as one key.
        """
        near, begin, own = self._on_host(first, last)
        always = int((own * (near // self.block + begin - near) + own * (own + 1) // 2).sum())
        return self._kept_rows(own) * (self.block - 1) + always * self._heads

    def gathered_pairs(self, first: int, last: int) -> Tensor:
        """Count the pairs that `attend_gathered` evaluates for these rows, kv heads once."""
        near, begin, own = self._on_host(first, last)
        always = int((own * (near // self.block + begin + own - near)).sum())
        return self._kept_rows(own) * (self.block - 1) + always * self._heads

    @property
    def _heads(self) -> int:
        return self.kept.shape[0] * self.kept.shape[1]

    def _on_host(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``[T]`` on the CPU: keys of far blocks, first row of a tile, rows of it."""
        begin = torch.arange(self.top, self.top + len(self.far)) * self.tile
        near = (begin - self.near).clamp_min(0) // self.block * self.block
        stop = (begin + self.tile).clamp_max(last)
        begin = begin.clamp_min(first)
        return near, begin, stop - begin

    def _kept_rows(self, own: Tensor) -> Tensor:
        """Return ``[]`` int64: the kept blocks, each as often as its tile has rows."""
        rows = self.kept.sum() * self.tile
        # Few launches: only the first and the last tile may have fewer rows.
        for at in {0, len(own) - 1}:
            if lacking := self.tile - int(own[at]):
                rows -= self.kept[:, :, at].sum() * lacking
        return rows

    def blocks(self, keys: Keys, last: int) -> Blocks:
        """Return the mask over ``keys`` up to position ``last``, one slot a block.

        Rows stand at the last slots. Waits for the device once, to learn the longest list.
        """
        batch, groups, tiles, count = self.kept.shape
        device = self.kept.device
        block = torch.arange(count, device=device)
        is_far = block < self.far[:, None]
        width = torch.where(self.kept, self.block, 1) * is_far
        end = width.cumsum(-1)
        at = end - width
        far = end[..., -1:] if count else width.new_zeros(batch, groups, tiles, 1)
        near = self.far * self.block
        stop = self.top * self.tile + torch.arange(1, tiles + 1, device=device) * self.tile
        stop.clamp_max_(last)
        counts = far[..., 0] + stop - near
        most = int(counts.max())
        # Column ``most`` takes what is no entry.
        lists = torch.zeros(batch, groups, tiles, most + 1, dtype=torch.int32, device=device)
        for step in range(self.block if count else 0):
            slot = torch.where(self.kept, keys.summaries + block * self.block + step, block)
            lists.scatter_(-1, torch.where(step < width, at + step, most), slot.int())
        # No tile has more: its first row and what is left of the block that `near` cuts.
        span = torch.arange(self.near + self.block - 1 + self.tile, device=device)
        slot = keys.summaries + near[:, None] + span
        place = torch.where(span < (stop - near)[:, None], far + span, most)
        lists.scatter_(-1, place, slot.int().expand(place.shape))
        above = keys.summaries // self.tile + self.top
        indices = lists.new_zeros(batch, groups, above + tiles, most)
        indices[:, :, above:] = lists[..., :most]
        full = lists.new_zeros(batch, groups, above + tiles)
        full[:, :, above:] = counts
        return Blocks._trusted(indices, full, block=1, tile=self.tile)


def far_blocks(settings: Dynamic, top: int, tiles: int, device: torch.device) -> Tensor:
    """Return ``[tiles]`` int64: how many blocks end at least ``near`` keys before each tile."""
    begin, step = top * settings.tile - settings.near, settings.tile
    old = torch.arange(begin, begin + tiles * step, step, device=device)
    return old.clamp_min_(0).div_(settings.block, rounding_mode="floor")


def select(q: Tensor, keys: Keys, settings: Dynamic, *, first: int, scale: float) -> Choice:
    """Choose the blocks of some rows' tiles.

    Args:
        q: ``[B, H, n, D]``, the rows at positions ``first`` to ``first + n - 1``; they end where a
            tile ends, or where the call ends.
        keys: Of the whole sequence, with summaries and landmarks.
        settings: How to choose.
        first: Position of the first row.
        scale: Factor of the logits.

    Returns:
        The choice, on q's device, by kernels made without waiting for it.
    """
    batch, groups = keys.k.shape[:2]
    last = first + q.shape[2]
    top = first // settings.tile
    tiles = -(-last // settings.tile) - top
    far = far_blocks(settings, top, tiles, q.device)
    count = max(0, (top + tiles - 1) * settings.tile - settings.near) // settings.block
    if count == 0 or settings.coverage == 1:
        is_far = torch.arange(count, device=q.device) < far[:, None]
        kept = is_far.expand(batch, groups, tiles, count)
    else:
        cost = summary_costs(q, keys, settings, far, count, first, scale)
        choose = by_kernels(cost, "keep") or keep
        kept = choose(cost, far, (1 - settings.coverage) ** 2)
    return Choice(kept, far, top, settings.tile, settings.block, settings.near)
