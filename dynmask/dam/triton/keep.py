# mypy: disable-error-code="no-untyped-def"
"""Which blocks to keep, on the GPU: a threshold by bisection, without a sort."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of up to so many blocks stay in registers; longer ones are read again and again.
_LONGEST = 16384
# Blocks of a row for one warp: 32 a thread.
_WARP = 1024


def keep(cost: Tensor, far: Tensor, allowed: float) -> Tensor:
    """Keep the blocks of largest cost, as few as leave a sum of at most ``allowed`` to the others.

    As `dynmask.dam.keep.keep`: blocks of equal cost are kept or left together. One program a row
    bisects the bits of the costs, which order floats that are not negative as they order integers:
    31 sums of the costs up to a candidate. All sums are float32, in the order of one fixed tree
    over places ``0 .. W - 1``, with zeros for costs that do not count, so that no sum falls when
    the candidate grows; in rows of more than 16384 blocks each place first adds up every 16384th
    cost, in their order. ``W`` is ``N`` rounded up to a power of two, at most 16384.

    Args:
        cost: ``[B, G, T, N]`` float32, finite and not negative; what is not far is not read.
        far: ``[T]`` int64: how many blocks are far, the first ones; no other block is kept.
        allowed: What the blocks that are not kept may cost together; taken as float32.

    Returns:
        ``[B, G, T, N]`` bool, contiguous.
    """
    assert cost.dtype == torch.float32, cost.dtype
    batch, groups, tiles, count = cost.shape
    kept = torch.empty(cost.shape, dtype=torch.int8, device=cost.device)
    if kept.numel():
        width = min(triton.next_power_of_2(count), _LONGEST)
        with torch.cuda.device_of(cost):
            _keep_kernel[(tiles, batch * groups)](
                cost.contiguous(),
                far,
                kept,
                float(allowed),
                tiles,
                count,
                WIDTH=width,
                WHOLE=count <= width,
                num_warps=min(max(width // _WARP, 1), 16),
            )
    return kept.view(torch.bool)


@triton.jit(do_not_specialize=["T", "N"])
def _keep_kernel(
    p_cost,
    p_far,
    p_kept,
    allowed,
    T,
    N,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Find the largest bits up to which all costs may be left; keep what is above."""
    i_t = tl.program_id(0)
    i_row = tl.program_id(1).to(tl.int64) * T + i_t
    p_cost += i_row * N
    p_kept += i_row * N
    far = tl.load(p_far + i_t).to(tl.int32)
    o = tl.arange(0, WIDTH)
    if WHOLE:
        b_cost = tl.load(p_cost + o, mask=o < far, other=0.0)
    low = -1
    high = 0x7F800000  # Of infinity, which is always too much.
    for _ in range(31):
        middle = low + (high - low) // 2
        if WHOLE:
            b_left = tl.where(b_cost.to(tl.int32, bitcast=True) <= middle, b_cost, 0.0)
        else:
            b_left = tl.zeros([WIDTH], dtype=tl.float32)
            for start in range(0, far, WIDTH):
                b_part = tl.load(p_cost + start + o, mask=start + o < far, other=0.0)
                b_left += tl.where(b_part.to(tl.int32, bitcast=True) <= middle, b_part, 0.0)
        fits = tl.sum(b_left, 0) <= allowed
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    for start in range(0, N, WIDTH):
        o_n = start + o
        if not WHOLE:
            b_cost = tl.load(p_cost + o_n, mask=o_n < far, other=0.0)
        is_kept = (b_cost.to(tl.int32, bitcast=True) > low) & (o_n < far)
        tl.store(p_kept + o_n, is_kept.to(tl.int8), mask=o_n < N)
