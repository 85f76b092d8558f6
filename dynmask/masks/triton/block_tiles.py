"""Which query tiles list each key block: the lists of `Blocks`, turned around."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BlockTiles(NamedTuple):
    """Query tiles that list each of ``N`` key blocks, end to end.

    Attributes:
        tiles: ``[B, G, T M]`` int32 query tiles of the mask, ascending for each block; those of
            block ``n`` are from ``begin[n]`` to ``begin[n + 1] - 1``.
        begin: ``[B, G, N + 1]`` int32.
    """

    tiles: Tensor
    begin: Tensor


def block_tiles(
    indices: Tensor, counts: Tensor, *, block: int, tile: int, q_len: int, k_len: int
) -> BlockTiles:
    """Turn the lists of the tiles that hold query rows around, without waiting for the device.

    Blocks in a tile's future or beyond the last key are left out. One stable sort of ``T M``
    numbers, so the result is the same in every run.

    Args:
        indices: ``[B, G, T, M]``, see `dynmask.masks.Blocks`, and so for counts, block and tile.
        counts: ``[B, G, T]``.
        block: Key slots of a block.
        tile: Query slots of a tile.
        q_len: Query rows, the last slots.
        k_len: Key slots.
    """
    first, last = (k_len - q_len) // tile, -(-k_len // tile)
    indices, counts = indices[:, :, first:last], counts[:, :, first:last]
    blocks = -(-k_len // block)
    place = torch.arange(indices.shape[3], device=indices.device)
    end = torch.arange(first + 1, last + 1, device=indices.device) * tile
    seen = (end.clamp_max(k_len) + block - 1) // block
    listed = (place < counts[..., None]) & (indices < seen[:, None])
    ordered, order = indices.where(listed, blocks).flatten(2).sort(dim=-1, stable=True)
    tiles = (order // max(1, indices.shape[3]) + first).int()
    each = torch.arange(blocks + 1, dtype=torch.int32, device=indices.device)
    begin = torch.searchsorted(ordered, each.expand(*ordered.shape[:2], -1).contiguous())
    return BlockTiles(tiles, begin.int())
