"""What the kernels look up about stripes: linear in the length, nothing per tile but one count."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional

from dynmask.masks import Stripes
from dynmask.ops.rows import stripe_tables


class StripeKeys(NamedTuple):
    """Columns and offsets of all heads, end to end.

    Attributes:
        is_column: ``[H, S]`` bool, see `dynmask.ops.rows.stripe_tables`.
        columns: int32; the last ``S`` are 0 to ``S - 1``, the columns of every full head.
        column_runs: ``[H, 2]`` int32: where a head's columns begin, and how many there are.
        offsets: int32.
        offset_runs: ``[H, 2]`` int32; none for full heads.
    """

    is_column: Tensor
    columns: Tensor
    column_runs: Tensor
    offsets: Tensor
    offset_runs: Tensor


class TileTables(NamedTuple):
    """Which keys a tile of rows reads, the same for all tiles.

    In a tile of positions ``[a, a + T)`` block ``m`` holds the keys from ``a + T - (m + 1) N`` on,
    of which distances to the tile's rows are the same in every tile. It is full if all of them are
    offsets, partial if some are.

    Attributes:
        near: ``[H, 2 S - 1]`` bool, see `dynmask.ops.rows.stripe_tables`.
        before: ``[H, S / T + 1]`` int32, columns before each tile.
        blocks: ``[H, 2, M]`` int32, the full blocks and the partial ones, nearest first. For full
            heads only those of the tile's own keys: all others are columns.
        reached: ``[H, 2, M + 1]`` int32, how many full and partial ones there are among the first
            ``m`` blocks.
    """

    near: Tensor
    before: Tensor
    blocks: Tensor
    reached: Tensor


def stripe_keys(mask: Stripes, k_len: int) -> StripeKeys:
    """Return the mask's tables for ``k_len`` tokens, made once for a power of two of them."""
    is_column, _ = stripe_tables(mask, k_len)
    size = is_column.shape[1]
    key = ("triton keys", size)
    if key not in mask.derived:
        every = torch.arange(size, device=mask.device)
        columns = torch.cat([*mask.columns, every])
        runs = _runs(mask.columns, mask.device)
        whole = torch.tensor([len(columns) - size, size], dtype=torch.int32).to(mask.device)
        column_runs = torch.where(mask.full_heads[:, None], whole, runs)
        offset_runs = _runs(mask.offsets, mask.device)
        offset_runs[:, 1].masked_fill_(mask.full_heads, 0)
        offsets = torch.cat(mask.offsets)
        mask.derived[key] = StripeKeys(
            is_column, columns.int(), column_runs, offsets.int(), offset_runs
        )
    keys: StripeKeys = mask.derived[key]
    return keys


def tile_tables(mask: Stripes, k_len: int, tile: int, block: int) -> TileTables:
    """Return the tables for tiles of ``T = tile`` rows and blocks of ``N = block`` keys.

    Args:
        mask: Columns and offsets; the corner and the padding are left out.
        k_len: Tokens that the tables reach at least.
        tile: A power of two up to 256.
        block: A power of two up to ``tile``.
    """
    is_column, near = stripe_tables(mask, k_len)
    size = is_column.shape[1]
    key = ("triton tiles", size, tile, block)
    if key not in mask.derived:
        before = is_column.view(mask.heads, -1, tile).sum(-1, dtype=torch.int32)
        before = functional.pad(before.cumsum(-1, dtype=torch.int32), (1, 0))
        # How many offsets there are under each distance.
        under = near[:, :size].flip(1).cumsum(-1, dtype=torch.int32)
        under = functional.pad(under, (1, 0))
        m = torch.arange((size + tile) // block, device=mask.device)
        low = m * block - tile + 1
        high = (m + 1) * block
        count = under[:, high.clamp_max(size)] - under[:, low.clamp(0, size)]
        own = m < tile // block
        partial = torch.where(mask.full_heads[:, None], own, count > 0)
        full = (count == high - low) & ~mask.full_heads[:, None]
        kinds = torch.stack([full, partial & ~full], 1)
        blocks = kinds.int().argsort(dim=-1, descending=True, stable=True).int()
        reached = functional.pad(kinds.cumsum(-1, dtype=torch.int32), (1, 0))
        mask.derived[key] = TileTables(near, before, blocks, reached)
    tables: TileTables = mask.derived[key]
    return tables


def corner_parts(
    first: int, last: int, tile: int, corner: Tensor | None
) -> list[tuple[int, int, Tensor | None]]:
    """Cut tiles ``first`` to ``last - 1`` into those that reach into the corner and the others."""
    edge = first
    if corner is not None:
        edge = max(first, min(last, triton.cdiv(corner.shape[1], tile)))
    parts = [(first, edge, corner), (edge, last, None)]
    return [part for part in parts if part[0] < part[1]]


def most_keys(mask: Stripes, k_len: int) -> int:
    """Return at least the number of keys that any row sees; waits for the device once a mask."""
    if "triton most" not in mask.derived:
        longest = max(len(c) + len(r) for c, r in zip(mask.columns, mask.offsets, strict=True))
        mask.derived["triton most"] = longest, bool(mask.full_heads.any())
    longest, some_full = mask.derived["triton most"]
    return k_len if some_full else min(longest, k_len)


def _runs(positions: tuple[Tensor, ...], device: torch.device) -> Tensor:
    counts = torch.tensor([len(p) for p in positions], dtype=torch.int32)
    begin = counts.cumsum(0, dtype=torch.int32) - counts
    return torch.stack([begin, counts], 1).to(device)
