"""Masks as torch FlexAttention takes them: a predicate, and which blocks it can hold anything in.

Torch's own `create_block_mask` evaluates the predicate on all of ``Q x K``. Here the blocks come
from the masks themselves, in ``O((Q / 128) (K / 128))``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from dynmask.masks import Blocks, Lifetimes, Mask, Padding, Stripes
from dynmask.ops.rows import per_query_head, stripe_tables

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SIZE = 128
"""Rows and keys of a block: torch's default, which its kernels' tiles divide."""

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(batch, query head, row, key) -> bool``, 0-d tensors."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The blocks of ``q_len`` rows at the last of ``k_len`` slots, and the call's heads.

    Attributes:
        a: ``[Tq, 1]`` int64, slot of each row block's first row.
        c: ``[Tq, 1]`` int64, one past the slot of its last row.
        x: ``[Tk]`` int64, first slot of each key block.
        y: ``[Tk]`` int64, one past its last slot.
        first: 0-d int64, slot of the first row. A tensor, so that compiled predicates fit any.
        q_len: ``Q``.
        k_len: ``K``.
        batch: ``B``.
        heads: ``H``.
        groups: ``G``.
        size: Rows and keys of a block.
    """

    a: Tensor
    c: Tensor
    x: Tensor
    y: Tensor
    first: Tensor
    q_len: int
    k_len: int
    batch: int
    heads: int
    groups: int
    size: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, size: int) -> Grid:
        """Cut the rows of ``q [B, H, Q, D]`` and the keys of ``k [B, G, K, D]``."""
        batch, heads, q_len, _ = q.shape
        groups, k_len = k.shape[1], k.shape[2]
        first = torch.full((), k_len - q_len, device=q.device)
        a = torch.arange(k_len - q_len, k_len, size, device=q.device)[:, None]
        x = torch.arange(0, k_len, size, device=q.device)
        c, y = (a + size).clamp_max(k_len), (x + size).clamp_max(k_len)
        return cls(a, c, x, y, first, q_len, k_len, batch, heads, groups, size)


def block_mask(mask: Mask | None, q: Tensor, k: Tensor, *, size: int = SIZE) -> BlockMask:
    """Return the mask for torch's ``flex_attention``.

    Blocks that the mask fills are listed apart, so that the predicate is not evaluated there. A
    block may be listed though it is empty (on the diagonal, at padding, in a corner), and a full
    one may pass as partial (where columns and offsets fill it together).

    Args:
        mask: What each head sees; None means causal.
        q: ``[B, H, Q, D]``, read for its shape and device.
        k: ``[B, G, K, D]``, likewise.
        size: Rows and keys of a block; torch's kernels want a multiple of their tiles.
    """
    from torch.nn.attention.flex_attention import BlockMask

    grid = Grid.of(q, k, size)
    padding = None
    if mask is None:
        some = every = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
        predicate = _causal(grid)
    elif isinstance(mask, Lifetimes):
        some, every = _lifetimes_blocks(mask, grid)
        predicate = _lifetimes(mask, grid)
    elif isinstance(mask, Blocks):
        some, every = _blocks_blocks(mask, grid)
        padding = mask.padding
        predicate = _blocks(mask, grid)
    else:
        some, every = _stripes_blocks(mask, grid)
        padding = mask.padding
        predicate = _stripes(mask, grid)
    # As torch has it, a block that the last row or key cuts off is not full.
    whole = (grid.c - grid.a == size) & (grid.y - grid.x == size)
    some, every = some & (grid.x < grid.c), every & whole & (grid.y - 1 <= grid.a)
    if padding is not None:
        start, stop = padding.start[:, None, None, None], padding.stop[:, None, None, None]
        some = some & (grid.a < stop) & (grid.c > start) & (grid.x < stop) & (grid.y > start)
        every = every & (grid.a >= start) & (grid.c <= stop)
        every = every & (grid.x >= start) & (grid.y <= stop)
        predicate = _inside(predicate, padding, grid)
    lists = [_lists(per_query_head(part, grid.heads)) for part in (some & ~every, every)]
    return BlockMask.from_kv_blocks(
        *lists[0],
        *lists[1],
        BLOCK_SIZE=size,
        mask_mod=predicate,
        seq_lengths=(q.shape[2], k.shape[2]),
    )


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks each row of ``[B, H, Tq, Tk]`` bool holds, and which, ascending."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


def _within(held: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Count what ``held [.., N]`` holds in ``[low, high)``: ``[.., *low.shape]`` int32."""
    below = pad(held.cumsum(-1, dtype=torch.int32), (1, 0))
    low, high = (t.clamp(0, held.shape[-1]) for t in torch.broadcast_tensors(low, high))
    return below[..., torch.maximum(low, high)] - below[..., low]


def _causal(grid: Grid) -> Predicate:
    first = grid.first

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return key <= row + first

    return sees


# Each kind has a function that tells of which blocks the mask may show something (`some`) and
# which it fills (`every`), causality and padding aside, and one that makes the predicate.


def _lifetimes_blocks(mask: Lifetimes, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return ``[B, G, Tq, Tk]`` bool each, from the shortest and longest life of a key block."""
    expiry = mask.expiry
    slot = torch.arange(expiry.shape[-1], device=expiry.device)
    expiry = expiry.where(expiry > slot, 0)
    expiry = pad(expiry, (0, -expiry.shape[-1] % grid.size)).unflatten(-1, (-1, grid.size))
    longest, shortest = expiry.amax(-1)[:, :, None], expiry.amin(-1)[:, :, None]
    return longest > grid.a, shortest >= grid.c


def _lifetimes(mask: Lifetimes, grid: Grid) -> Predicate:
    expiry = mask.expiry.expand(grid.batch, grid.groups, -1)
    first, ratio = grid.first, grid.heads // grid.groups

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        slot = row + first
        return (key <= slot) & (slot < expiry[b, h // ratio, key])

    return sees


def _blocks_blocks(mask: Blocks, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return ``[B, G, Tq, Tk]`` bool each, counting the mask's own blocks in every block."""
    table, top = _block_table(mask, grid)
    low, high = grid.x // mask.block, (grid.y - 1) // mask.block + 1
    listed = _within(table, low, high)
    tiles = (grid.a[:, 0] // mask.tile - top, (grid.c[:, 0] - 1) // mask.tile + 1 - top)
    some = _within((listed > 0).transpose(2, 3), *tiles) > 0
    every = _within((listed == high - low).transpose(2, 3), *tiles) == tiles[1] - tiles[0]
    return some.transpose(2, 3), every.transpose(2, 3)


def _blocks(mask: Blocks, grid: Grid) -> Predicate:
    table, top = _block_table(mask, grid)
    table = table.expand(grid.batch, grid.groups, -1, -1)
    first, ratio, tile, block = grid.first, grid.heads // grid.groups, mask.tile, mask.block
    inner = first - top * tile

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        listed = table[b, h // ratio, (row + inner) // tile, key // block]
        return listed & (key <= row + first)

    return sees


def _block_table(mask: Blocks, grid: Grid) -> tuple[Tensor, int]:
    """Return ``[B, G, tiles, blocks]`` bool for the tiles that hold rows, and the first of them."""
    top = (grid.k_len - grid.q_len) // mask.tile
    return mask.table(top, -(-grid.k_len // mask.tile), grid.k_len), top


def _stripes_blocks(mask: Stripes, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return ``[B or 1, H, Tq, Tk]`` bool each, counting columns and offsets in every block."""
    columns, near = stripe_tables(mask, grid.k_len)
    size = columns.shape[1]
    offsets = near[:, :size].flip(1)
    start = torch.zeros(1, 1, 1, dtype=torch.int64, device=mask.device)
    if mask.padding is not None:
        start = mask.padding.start[:, None, None]
    keys = (grid.x - start, grid.y - start)
    # Rows [a, c) and keys [x, y) are from a - (y - 1) to c - 1 - x apart.
    apart = (grid.a - grid.y + 1, grid.c - grid.x)
    in_columns = _within(columns, *keys).transpose(0, 1)
    in_offsets = _within(offsets, *apart)
    some = (in_columns > 0) | (in_offsets > 0)
    width, reach = keys[1] - keys[0], apart[1] - apart[0]
    every = (in_columns == width[:, None]) | (in_offsets == reach)
    if mask.corner is not None:
        edge = mask.corner.shape[1]
        some = some | ((grid.a - start < edge) & (grid.x - start < edge))[:, None]
    return some, every


def _stripes(mask: Stripes, grid: Grid) -> Predicate:
    columns, near = stripe_tables(mask, grid.k_len)
    first, origin, corner = grid.first, columns.shape[1] - 1, mask.corner
    start = torch.zeros(grid.batch, dtype=torch.int64, device=mask.device)
    if mask.padding is not None:
        start = mask.padding.start
    # Moved to where each batch row begins, so that the kernel looks up once, not twice.
    position = torch.arange(grid.k_len, device=mask.device) - start[:, None]
    columns = columns[:, position.clamp_min(0)].transpose(0, 1).contiguous()

    def sees_stripe(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        slot = row + first
        return (columns[b, h, key] | near[h, origin - (slot - key)]) & (key <= slot)

    if corner is None:
        return sees_stripe
    edge = corner.shape[1]

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        i, j = row + first - start[b], key - start[b]
        inside = (i < edge) & (j < edge)
        shown = corner[h, i.clamp(0, edge - 1), j.clamp(0, edge - 1)]  # Causal, as i and j are.
        return sees_stripe(b, h, row, key) | (inside & (j <= i) & shown)

    return sees


def _inside(predicate: Predicate, padding: Padding, grid: Grid) -> Predicate:
    """Return the predicate for real rows and real keys only."""
    first = grid.first
    start, stop = (t.expand(grid.batch).contiguous() for t in (padding.start, padding.stop))

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        slot = row + first
        real = (start[b] <= key) & (start[b] <= slot) & (key < stop[b]) & (slot < stop[b])
        return real & predicate(b, h, row, key)

    return sees
