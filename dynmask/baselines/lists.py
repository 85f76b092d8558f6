"""Block masks from lists that are right as they are made."""

from __future__ import annotations

from torch import Tensor

from dynmask.masks import Blocks


def listed_blocks(indices: Tensor, counts: Tensor, *, block: int, tile: int) -> Blocks:
    """Return the mask without checking its lists, which on a GPU would wait for the device.

    Args:
        indices: ``[B, G, T, M]`` int32, see `dynmask.masks.Blocks`, and so for the others.
        counts: ``[B, G, T]`` int32.
        block: Key slots of a block.
        tile: Query slots of a tile.
    """
    mask = object.__new__(Blocks)
    mask.__dict__.update(indices=indices, counts=counts, block=block, tile=tile, padding=None)
    return mask
