# mypy: disable-error-code="no-untyped-def"
"""A few vectors that stand for a block of them, on the GPU: one program a block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Cells of a block for one warp: 64 a thread, in float32.
_WARP = 2048


def landmarks(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the landmarks of each block, and where in it the vectors among them stand.

    As `dynmask.dam.landmarks.landmarks`. Sums and distances are float32, and a distance is the sum
    of squared differences, 0 between equal vectors. Each block is read once and stays in registers:
    meant for blocks of up to 65536 cells.

    Args:
        x: ``[B, G, n, block, D]`` float16, bfloat16 or float32, ``n`` blocks of keys or queries, or
            ``[B, G, n, R, tile, D]`` with the block's axis in two; copied if the last stride is
            not 1.
        count: Landmarks of a block, 1 to ``block``.

    Returns:
        ``[B, G, count, n, D]`` in x's dtype, contiguous, the mean of the vectors not taken last;
        and ``[B, G, n, count - 1]`` int64, the places of the others in their block.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    x = x if x.dim() == 6 else x.unsqueeze(3)
    batch, groups, n, outer, inner, dim = x.shape
    block = outer * inner
    marks = x.new_empty(batch, groups, count, n, dim)
    places = torch.empty(batch, groups, n, count - 1, dtype=torch.int64, device=x.device)
    block_j, block_d = triton.next_power_of_2(block), triton.next_power_of_2(dim)
    if marks.numel():
        with torch.cuda.device_of(x):
            _landmark_kernel[(n, groups, batch)](
                x,
                marks,
                places,
                *x.stride()[:5],
                n,
                count,
                block,
                inner,
                D=dim,
                BLOCK_J=block_j,
                BLOCK_D=block_d,
                num_warps=min(max(block_j * block_d // _WARP, 1), 16),
            )
    return marks, places


@triton.jit(do_not_specialize=["n", "count"])
def _landmark_kernel(
    p_x,
    p_marks,
    p_places,
    s_b,
    s_g,
    s_n,
    s_r,
    s_j,
    n,
    count,
    block,
    inner,
    D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Take the farthest vector ``count - 1`` times; what is left gives its mean."""
    i_n = tl.program_id(0).to(tl.int64)
    i_g = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_bg = i_b * tl.num_programs(1) + i_g
    p_x += i_b * s_b + i_g * s_g + i_n * s_n
    p_marks += (i_bg * count * n + i_n) * D
    p_places += (i_bg * n + i_n) * (count - 1)
    o_j = tl.arange(0, BLOCK_J)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_x = tl.load(
        p_x + ((o_j // inner).to(tl.int64) * s_r + (o_j % inner) * s_j)[:, None] + o_d[None, :],
        mask=(o_j < block)[:, None] & m_d[None, :],
        other=0.0,
    )
    b_away = b_x.to(tl.float32) - (tl.sum(b_x.to(tl.float32), 0) / block)[None, :]
    # Below every distance: vectors that are taken, and places without one.
    b_distance = tl.where(o_j < block, tl.sum(b_away * b_away, 1), -1.0)
    for i in range(count - 1):
        # It is a vector's, unless distances are NaN.
        place = tl.minimum(tl.argmax(b_distance, 0), block - 1)
        tl.store(p_places + i, place)
        # From the cache: a sum over the block in registers would take longer.
        p_taken = p_x + (place // inner).to(tl.int64) * s_r + (place % inner) * s_j
        b_taken = tl.load(p_taken + o_d, mask=m_d, other=0.0)
        tl.store(p_marks + o_d, b_taken, mask=m_d)
        p_marks += n.to(tl.int64) * D
        b_away = b_x.to(tl.float32) - b_taken.to(tl.float32)[None, :]
        b_distance = tl.minimum(b_distance, tl.sum(b_away * b_away, 1))
        b_distance = tl.where(o_j == place, -1.0, b_distance)
    b_rest = tl.where((b_distance >= 0)[:, None], b_x.to(tl.float32), 0.0)
    b_rest = tl.sum(b_rest, 0) / (block - count + 1)
    tl.store(p_marks + o_d, b_rest.to(p_marks.dtype.element_ty), mask=m_d)
