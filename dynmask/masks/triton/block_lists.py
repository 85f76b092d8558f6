# mypy: disable-error-code="no-untyped-def"
"""Which keys each tile of query rows gathers, from lists of key blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynmask.masks.blocks import Blocks
from dynmask.masks.triton.schedule import TILE, TileLists

_BLOCK = 1024


def list_tile(tile: int) -> int:
    """Return the query slots of the lists for a mask's ``tile``: `TILE` where that divides it."""
    return tile if tile % TILE else TILE


def immortal(mask: Blocks, k_len: int) -> Tensor:
    """Return ``[B or 1, 1, K]`` int32: until when each key is seen, blocks left out of account.

    To the end, or to that of the batch row's tokens; keys that are padding are dead from the start.
    """
    if mask.padding is None:
        return torch.full((1, 1, k_len), k_len, dtype=torch.int32, device=mask.device)
    slot = torch.arange(k_len, device=mask.device)
    start, stop = mask.padding.start[:, None], mask.padding.stop[:, None]
    return torch.where(slot >= start, stop.maximum(slot), slot).int()[:, None]


def block_lists(
    indices: Tensor, counts: Tensor, expiry: Tensor, *, block: int, tile: int, q_len: int
) -> TileLists:
    """List the keys that each tile of query rows sees, in one kernel.

    As `dynmask.masks.triton.schedule.tile_lists`, with tiles of `list_tile` slots: a key of a
    listed block is full if ``j <= a`` and ``b <= expiry_j``, partial if it is not full but some
    row of the tile sees it.

    Args:
        indices: ``[B, G, T, M]``, see `dynmask.masks.Blocks`, and so for counts, block and tile.
        counts: ``[B, G, T]``.
        expiry: ``[B or 1, 1, K]``, contiguous, of `immortal`.
        block: Key slots of a block.
        tile: Query slots of the mask's tile.
        q_len: Query rows, the last slots.
    """
    k_len = expiry.shape[2]
    t0 = (k_len - q_len) // list_tile(tile)
    tiles = triton.cdiv(k_len, list_tile(tile)) - t0
    batch = max(indices.shape[0], expiry.shape[0])
    shape = batch, indices.shape[1], tiles, min(indices.shape[3] * block, k_len)
    keys = expiry.new_empty(shape)
    full = expiry.new_empty(shape[:3])
    partial = torch.empty_like(full)
    indices, counts = indices.contiguous(), counts.contiguous()
    _block_kernel[(shape[2], shape[1], shape[0])](
        indices,
        counts,
        expiry,
        keys,
        full,
        partial,
        counts.stride(0) if len(counts) > 1 else 0,
        k_len if len(expiry) > 1 else 0,
        *indices.shape[2:],
        k_len,
        t0,
        shape[3],
        tile,
        block,
        TILE=list_tile(tile),
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return TileLists(keys, full, partial)


@triton.jit
def _block_kernel(
    p_indices,
    p_counts,
    p_expiry,
    p_keys,
    p_full,
    p_partial,
    s_b,
    s_eb,
    T,
    M,
    K,
    t0,
    width,
    mask_tile,
    block,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Split a tile's keys: full ones from the list's front, partial ones from its end."""
    i_t = tl.program_id(0)
    i_g = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    i_list = (i_b * tl.num_programs(1) + i_g) * tl.num_programs(0) + i_t
    a = (t0 + i_t) * TILE
    b = tl.minimum(a + TILE, K)
    i_from = i_b * s_b + i_g * T + a // mask_tile
    p_indices += i_from * M
    p_expiry += i_b * s_eb
    p_keys += i_list * width
    n_full = 0
    n_partial = 0
    total = tl.load(p_counts + i_from) * block
    for start in range(0, total, BLOCK):
        o = start + tl.arange(0, BLOCK)
        o_j = tl.load(p_indices + o // block, mask=o < total, other=0)
        # Blocks in the tile's future are listed too at times, far beyond the last key even.
        o_j = tl.minimum(o_j, (K + block - 1) // block) * block + o % block
        m_j = (o < total) & (o_j < b)
        b_e = tl.load(p_expiry + o_j, mask=m_j, other=0)
        is_full = m_j & (o_j <= a) & (b_e >= b)
        is_partial = m_j & (b_e > tl.maximum(o_j, a)) & (is_full == 0)
        # One scan for both counts, in the halves of an int32.
        both = tl.cumsum(is_full.to(tl.int32) + (is_partial.to(tl.int32) << 16), 0)
        tl.store(p_keys + n_full + (both & 0xFFFF) - 1, o_j, mask=is_full)
        tl.store(p_keys + width - n_partial - (both >> 16), o_j, mask=is_partial)
        both = tl.max(both, 0)  # The scan never falls in either half, so its last is its largest.
        n_full += both & 0xFFFF
        n_partial += both >> 16
    tl.store(p_full + i_list, n_full)
    tl.store(p_partial + i_list, n_partial)
