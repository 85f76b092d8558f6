"""Choose, for each tile of query rows, the key blocks that a summary would not do for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynmask.dam.dynamic_keys import Keys
from dynmask.masks import Blocks
from dynmask.ops.reference import accumulation_dtype

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
        begin, end = self._rows(first, last)
        near = self.far * self.block
        causal = (end - begin) * (begin - near) + (end - begin) * (end - begin + 1) // 2
        return (self._far_keys() * (end - begin) + causal).sum()

    def gathered_pairs(self, first: int, last: int) -> Tensor:
        """Count the pairs that `attend_gathered` evaluates for these rows, kv heads once."""
        begin, end = self._rows(first, last)
        return ((self._far_keys() + end - self.far * self.block) * (end - begin)).sum()

    def _far_keys(self) -> Tensor:
        return self.far + self.kept.sum(-1) * (self.block - 1)

    def _rows(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return ``[T]`` first rows of the tiles and ``[T]`` ends, cut to the rows at hand."""
        tile = torch.arange(self.top, self.top + len(self.far), device=self.far.device)
        return (tile * self.tile).clamp_min(first), ((tile + 1) * self.tile).clamp_max(last)

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
        _, stop = self._rows(0, last)
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
    begin = torch.arange(top, top + tiles, device=device) * settings.tile
    return (begin - settings.near).clamp_min(0) // settings.block


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
        The choice, on q's device, made without waiting for it.
    """
    batch, groups = keys.k.shape[:2]
    last = first + q.shape[2]
    top = first // settings.tile
    tiles = -(-last // settings.tile) - top
    far = far_blocks(settings, top, tiles, q.device)
    count = max(0, (top + tiles - 1) * settings.tile - settings.near) // settings.block
    if count == 0 or settings.coverage == 1:
        kept = torch.ones(batch, groups, tiles, count, dtype=torch.bool, device=q.device)
    else:
        cost, order = _cost(q, keys, settings, far, count, first, scale).sort(-1, descending=True)
        left = cost.flip(-1).cumsum(-1).flip(-1)
        kept = torch.zeros(cost.shape, dtype=torch.bool, device=q.device)
        kept.scatter_(-1, order, left > (1 - settings.coverage) ** 2)
    is_far = torch.arange(count, device=q.device) < far[:, None]
    return Choice(kept & is_far, far, top, settings.tile, settings.block, settings.near)


def _cost(
    q: Tensor,
    keys: Keys,
    settings: Dynamic,
    far: Tensor,
    count: int,
    first: int,
    scale: float,
) -> Tensor:
    """Return ``[B, G, T, count]``, the mean cost of each block's summary to each tile's rows.

    Zero for blocks that are not far.
    """
    batch, groups = keys.k.shape[:2]
    heads, n, dim = q.shape[1:]
    tile, tiles = settings.tile, len(far)
    top = torch.arange(tiles, device=q.device)[:, None] + first // tile
    row = top * tile + torch.arange(tile, device=q.device)
    # Rows that the first and the last tile lack are zeros, and do not count.
    before = first - first // tile * tile
    q = torch.nn.functional.pad(q, (0, 0, before, tiles * tile - before - n))
    q = q.view(batch, groups, heads // groups, tiles, tile, dim)
    real = ((row >= first) & (row < first + n)).to(accumulation_dtype(q.dtype))

    q = q * scale
    near = _near_logits(q, keys, settings, far, row, first + n)
    is_far = (torch.arange(count, device=q.device) < far[:, None])[:, None]
    # What lies behind a tile must not even set the scale. Before this block all is far.
    some = max(0, first // tile * tile - settings.near) // settings.block
    behind = ~is_far[..., some:]
    rows = q.flatten(2, 4)
    marks = settings.landmarks
    of_marks = keys.landmarks[:, :, :, :count].flatten(2, 3)
    weights = (rows @ of_marks.mT).to(near.dtype).view(*q.shape[:5], marks, count)
    weights[..., some:].masked_fill_(behind[..., None, :], float("-inf"))
    summary = (rows @ keys.means(count).mT).to(near.dtype).view(*q.shape[:5], count)
    summary[..., some:].masked_fill_(behind, float("-inf"))
    # Relative to the row's largest, which no block's mean logit exceeds.
    largest = torch.maximum(weights.flatten(-2).amax(-1), near.amax(-1))[..., None]
    weights = weights.sub_(largest[..., None]).exp_()
    summary = summary.sub_(largest).exp_()
    total = near.sub_(largest).exp_().sum(-1, keepdim=True)
    # The last landmark stands for the rest of the block.
    rest = settings.block - marks + 1
    mass = weights.sum(-2).add_(weights[..., -1, :], alpha=rest - 1)
    total += mass.sum(-1, keepdim=True)
    square = weights.square_().sum(-2).add_(weights[..., -1, :], alpha=rest - 1)
    # sum (P - A)^2 over a block's keys, the share of its summary in A.
    cost = square.addcmul_(summary, mass, value=-2)
    cost.addcmul_(summary, summary, value=settings.block)
    cost /= total.square()
    cost = (cost.mean(2) * real[..., None]).sum(3) / real.sum(1)[:, None]
    return cost.clamp_min_(0)


def _near_logits(
    q: Tensor, keys: Keys, settings: Dynamic, far: Tensor, row: Tensor, last: int
) -> Tensor:
    """Return ``[B, G, R, T, tile, W]`` logits of the keys that are not far; -inf for no key."""
    batch, groups, ratio, tiles, tile, dim = q.shape
    # No tile has more: the end of the block that `near` cuts, `near` itself and its own rows.
    width = torch.arange(settings.near + settings.block - 1 + tile, device=q.device)
    place = (far * settings.block)[:, None] + width
    k = keys.tokens(0, last)[:, :, place.clamp_max(last - 1).flatten()]
    k = k.view(batch, groups, tiles, len(width), dim)
    rows = q.transpose(2, 3).reshape(batch, groups, tiles, ratio * tile, dim)
    found = (rows @ k.mT).to(accumulation_dtype(q.dtype))
    found = found.view(batch, groups, tiles, ratio, tile, len(width)).transpose(2, 3)
    hidden = (place[:, None] > row[..., None]) | (place >= last)[:, None]
    return found.masked_fill(hidden, float("-inf"))
