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
        mask = object.__new__(Blocks)  # Made right: checking it would wait for the device.
        mask.__dict__.update(indices=indices, counts=full, block=1, tile=self.tile, padding=None)
        return mask


def far_blocks(settings: Dynamic, top: int, tiles: int, device: torch.device) -> Tensor:
    """Return ``[tiles]`` int64: how many blocks end at least ``near`` keys before each tile."""
    begin = torch.arange(top, top + tiles, device=device) * settings.tile
    return (begin - settings.near).clamp_min(0) // settings.block


def sampled_rows(settings: Dynamic, first: int, last: int, *, ends: bool) -> Tensor:
    """Return the sampled positions in ``[first, last)``, ascending.

    The last row of every ``stride`` and the first of every tile, counted from position 0; where a
    call ends, its ``last`` rows.
    """
    row = torch.arange(first, last)
    rows = row[(row % settings.stride == settings.stride - 1) | (row % settings.tile == 0)]
    if not ends:
        return rows
    tail = max(first, last - settings.last)
    return torch.cat([rows[rows < tail], torch.arange(tail, last)])


def select(
    q: Tensor, keys: Keys, settings: Dynamic, *, first: int, scale: float, ends: bool
) -> Choice:
    """Choose the blocks of some rows' tiles.

    Args:
        q: ``[B, H, n, D]``, the rows at positions ``first`` to ``first + n - 1``; they end where a
            tile ends, or where the call ends.
        keys: Of the whole sequence, with summaries.
        settings: How to choose.
        first: Position of the first row.
        scale: Factor of the logits.
        ends: Whether these are the last rows of the call.

    Returns:
        The choice, on q's device, made without waiting for it.
    """
    batch, heads, n, dim = q.shape
    groups = keys.k.shape[1]
    last = first + n
    top = first // settings.tile
    tiles = -(-last // settings.tile) - top
    far = far_blocks(settings, top, tiles, q.device)
    count = max(0, (top + tiles - 1) * settings.tile - settings.near) // settings.block
    if count == 0:
        kept = torch.zeros(batch, groups, tiles, 0, dtype=torch.bool, device=q.device)
        return Choice(kept, far, top, settings.tile, settings.block, settings.near)
    rows = sampled_rows(settings, first, last, ends=ends).to(q.device)
    work = accumulation_dtype(q.dtype)
    sample = q[:, :, rows - first].reshape(batch, groups, -1, dim)
    shape = (batch, heads, len(rows))
    logits = (sample @ keys.tokens(last).transpose(2, 3)).to(work).mul_(scale).view(*shape, last)
    later = torch.arange(first, last, device=q.device) > rows[:, None]
    logits[..., first:].masked_fill_(later, float("-inf"))
    # Weights relative to the row's largest, which no mean logit of a block exceeds.
    largest = logits.amax(-1, keepdim=True)
    weights = logits.sub_(largest).exp_()
    total = weights.sum(-1, keepdim=True)
    summary = (sample @ keys.means(count).transpose(2, 3)).to(work).mul_(scale).view(*shape, count)
    summary = summary.sub_(largest).exp_()
    weights = weights[..., : count * settings.block].unflatten(-1, (count, -1))
    mass = weights.sum(-1)
    # sum (P - A)^2 without a tensor of the size of P.
    cost = weights.square_().sum(-1) - 2 * summary * mass + settings.block * summary.square()
    cost /= total.square()
    # Blocks that are not far from a row's tile hold keys that the row may not even see.
    tile = rows // settings.tile - top
    is_far = torch.arange(count, device=q.device) < far[:, None]
    cost.masked_fill_(~is_far[tile], 0)
    # Means over a tile's rows as a product: unlike index_add, the same bits in every run.
    of_tile = (tile == torch.arange(tiles, device=q.device)[:, None]).to(work)
    of_tile /= of_tile.sum(-1, keepdim=True)
    mean = cost.view(batch, groups, heads // groups, len(rows), count).mean(2)
    score = (of_tile @ mean).clamp_min_(0)
    score, order = score.sort(-1, descending=True)
    left = score.flip(-1).cumsum(-1).flip(-1)
    if settings.coverage == 1:
        # A cost that rounds to 0 is one for the rows that were sampled only.
        kept = torch.ones(score.shape, dtype=torch.bool, device=q.device)
    else:
        kept = torch.zeros(score.shape, dtype=torch.bool, device=q.device)
        kept.scatter_(-1, order, left > (1 - settings.coverage) ** 2)
    return Choice(kept & is_far, far, top, settings.tile, settings.block, settings.near)
