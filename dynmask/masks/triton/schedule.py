# mypy: disable-error-code="no-untyped-def"
"""Which keys each tile of query rows gathers, from lifetimes: compaction in two levels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Query slots of a tile: its rows gather one list of keys.
TILE = 128
# Slots between two coarse lists. A tile filters one coarse list and the slots since.
_COARSE = 4096
_BLOCK = 2048


class TileLists(NamedTuple):
    """Keys of every tile of `TILE` query slots.

    Attributes:
        keys: ``[B, G, T, C]`` int32 key slots; every row of the tile sees the first ``full``, some
            see the last ``partial``.
        full: ``[B, G, T]`` int32.
        partial: ``[B, G, T]`` int32.
    """

    keys: Tensor
    full: Tensor
    partial: Tensor


def tile_lists(expiry: Tensor, *, q_len: int, most: int) -> TileLists:
    """List the keys that each tile of query rows sees.

    Tile ``t`` holds the key slots ``[a, b)``, ``a = TILE * (t + t0)``, ``b = a + TILE`` and
    ``t0 = (K - q_len) // TILE``. A key is full if ``j <= a`` and ``b <= expiry_j``, partial if it
    is not full but lives at some slot of the tile. ``O(K^2 / 4096 + K (most + 4096) / TILE)`` work
    in two kernels, without waiting for the device.

    Args:
        expiry: ``[B, G, K]`` int32, see `dynmask.masks.Lifetimes`; contiguous along K.
        q_len: Query rows, the last slots.
        most: At least the number of keys that any row sees.
    """
    batch, groups, k_len = expiry.shape
    device = expiry.device
    t0 = (k_len - q_len) // TILE
    tiles, width = list_shape(k_len, q_len, most)
    keys = torch.empty(batch, groups, tiles, width, dtype=torch.int32, device=device)
    full = torch.empty(batch, groups, tiles, dtype=torch.int32, device=device)
    partial = torch.empty_like(full)
    if keys.numel() == 0:
        return TileLists(keys, full, partial)
    c0 = t0 * TILE // _COARSE
    boundaries = triton.cdiv(k_len, _COARSE) - c0
    coarse_width = min(most, k_len)
    coarse = torch.empty(batch * groups, boundaries, coarse_width, dtype=torch.int32, device=device)
    alive = torch.empty(batch * groups, boundaries, dtype=torch.int32, device=device)
    _coarse_kernel[(boundaries, batch * groups)](
        expiry,
        coarse,
        alive,
        groups,
        expiry.stride(0),
        expiry.stride(1),
        c0,
        boundaries,
        coarse_width,
        COARSE=_COARSE,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    _tile_kernel[(tiles, batch * groups)](
        expiry,
        coarse,
        alive,
        keys,
        full,
        partial,
        groups,
        expiry.stride(0),
        expiry.stride(1),
        k_len,
        t0,
        tiles,
        width,
        c0,
        boundaries,
        coarse_width,
        TILE=TILE,
        COARSE=_COARSE,
        BLOCK=_BLOCK // 2,
        num_warps=4,
    )
    return TileLists(keys, full, partial)


def is_listed(k_len: int, most: int) -> bool:
    """Tell whether lists pay: whether they save a quarter of the last tile's prefix.

    If not, kernels walk over whole prefixes and test every pair.
    """
    return 4 * most < 3 * k_len


def list_shape(k_len: int, q_len: int, most: int) -> tuple[int, int]:
    """Return the number of tiles and the length of a list."""
    tiles = triton.cdiv(k_len, TILE) - (k_len - q_len) // TILE
    return tiles, most + TILE


@triton.jit(do_not_specialize=["G", "c0", "boundaries", "width"])
def _coarse_kernel(
    p_expiry,
    p_coarse,
    p_alive,
    G,
    s_b,
    s_g,
    c0,
    boundaries,
    width,
    COARSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the keys ``j < a`` that live at the coarse boundary ``a``, ascending."""
    i_c = tl.program_id(0)
    i_bg = tl.program_id(1).to(tl.int64)
    p_expiry += (i_bg // G) * s_b + (i_bg % G) * s_g
    p_coarse += (i_bg * boundaries + i_c) * width
    a = (c0 + i_c) * COARSE
    n = 0
    for start in range(0, a, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_e = tl.load(p_expiry + o, mask=o < a, other=0)
        lives = b_e > a
        place = n + tl.cumsum(lives.to(tl.int32), 0)
        tl.store(p_coarse + place - 1, o, mask=lives & (place <= width))
        n = tl.max(place, 0)
    tl.store(p_alive + i_bg * boundaries + i_c, n)


@triton.jit(
    do_not_specialize=["G", "K", "t0", "tiles", "width", "c0", "boundaries", "coarse_width"]
)
def _tile_kernel(
    p_expiry,
    p_coarse,
    p_alive,
    p_keys,
    p_full,
    p_partial,
    G,
    s_b,
    s_g,
    K,
    t0,
    tiles,
    width,
    c0,
    boundaries,
    coarse_width,
    TILE: tl.constexpr,
    COARSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Split what lives in a tile: full keys from the list's front, partial ones from its end."""
    i_t = tl.program_id(0)
    i_bg = tl.program_id(1).to(tl.int64)
    p_expiry += (i_bg // G) * s_b + (i_bg % G) * s_g
    p_keys += (i_bg * tiles + i_t) * width
    a = (t0 + i_t) * TILE
    b = tl.minimum(a + TILE, K)
    i_c = a // COARSE - c0
    p_coarse += (i_bg * boundaries + i_c) * coarse_width
    n_coarse = tl.minimum(tl.load(p_alive + i_bg * boundaries + i_c), coarse_width)
    begin = (c0 + i_c) * COARSE
    n_full = 0
    n_partial = 0
    total = n_coarse + b - begin
    for start in range(0, total, BLOCK):
        o = start + tl.arange(0, BLOCK)
        listed = tl.load(p_coarse + o, mask=o < n_coarse, other=0)
        j = tl.where(o < n_coarse, listed, begin + o - n_coarse)
        b_e = tl.load(p_expiry + j, mask=o < total, other=0)
        is_full = (j <= a) & (b_e >= b)
        is_partial = (b_e > a) & (b_e > j) & (is_full == 0)
        # One scan for both counts, in the halves of an int32.
        both = tl.cumsum(is_full.to(tl.int32) + (is_partial.to(tl.int32) << 16), 0)
        from_front = n_full + (both & 0xFFFF) - 1
        from_end = n_partial + (both >> 16)
        tl.store(p_keys + from_front, j, mask=is_full & (from_front < width))
        tl.store(p_keys + width - from_end, j, mask=is_partial & (from_end <= width))
        both = tl.max(both, 0)  # The scan never falls in either half, so its last is its largest.
        n_full += both & 0xFFFF
        n_partial += both >> 16
    tl.store(p_full + i_bg * tiles + i_t, n_full)
    tl.store(p_partial + i_bg * tiles + i_t, n_partial)
