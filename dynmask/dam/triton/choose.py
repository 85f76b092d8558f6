# mypy: disable-error-code="no-untyped-def"
"""Choose the blocks of a decode step, on the GPU: costs, threshold and mask in two launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynmask.dam.paged_costs import PageStats
from dynmask.masks.lifetimes import NEVER
from dynmask.ops.triton.common import dot_precision

_WARP = 1024  # Blocks of a kv head for one warp.
_KEYS = 64  # Near keys at a time.
_SLOTS = 1024  # Slots of the mask for one program.


def choose_pages(
    q: Tensor,
    near: Tensor,
    stats: PageStats,
    *,
    block: int,
    room: int,
    allowed: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Keep the blocks of largest cost, and write the mask that says so.

    `dynmask.dam.paged_costs.page_costs` and `dynmask.dam.triton.keep.keep` in one program a kv
    head, from registers.

    Args:
        q: ``[B, G, R, D]``, the rows of a kv head, at most 64.
        near: ``[B, G, n, D]``, the keys that are in no block, the row's own last; last stride 1.
        stats: Of at most 16,384 blocks, parts of one contiguous tensor.
        block: Keys of a block.
        room: Slots in front of the keys, one a block, at least as many as there are blocks.
        allowed: What the summaries may cost together; taken as float32.
        scale: Factor of the logits.

    Returns:
        Expiries ``[B, G, room + K]`` int32 over summaries and keys, `NEVER` for what the row sees
        and 0 for the rest; and how many slots it sees in all batch rows and kv heads, ``[]`` int64.
    """
    batch, groups, rows, dim = q.shape
    count = stats.top.shape[3]
    tokens = count * block + near.shape[2]
    kept = torch.empty(batch, groups, count, dtype=torch.int8, device=q.device)
    expiry = torch.empty(batch, groups, room + tokens, dtype=torch.int32, device=q.device)
    shown = torch.empty(batch, groups, dtype=torch.int64, device=q.device)
    width = triton.next_power_of_2(count)
    with torch.cuda.device_of(q):
        _choose_kernel[(groups, batch)](
            q.contiguous(),
            near,
            stats.top,
            kept,
            shown,
            *near.stride()[:3],
            stats.mass.storage_offset() - stats.top.storage_offset(),
            count,
            near.shape[2],
            scale,
            float(allowed),
            R=rows,
            BLOCK=block,
            D=dim,
            BLOCK_R=max(16, triton.next_power_of_2(rows)),
            BLOCK_J=_KEYS,
            BLOCK_D=max(16, triton.next_power_of_2(dim)),
            WIDTH=width,
            PRECISION=dot_precision(q),
            num_warps=min(max(width // _WARP, 4), 16),
        )
        _mask_kernel[(triton.cdiv(expiry.shape[2], _SLOTS), batch * groups)](
            kept, expiry, count, room, expiry.shape[2], BLOCK=block, SLOTS=_SLOTS, SEEN=NEVER
        )
    return expiry, shown.sum()


@triton.jit(do_not_specialize=["s_part", "count", "n"])
def _choose_kernel(
    p_q,
    p_k,
    p_stats,
    p_kept,
    p_shown,
    s_b,
    s_g,
    s_n,
    s_part,
    count,
    n,
    scale,
    allowed,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum up what is near, then the blocks' weights row by row; bisect the costs' bits."""
    i_g = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    i_bg = i_b * tl.num_programs(0) + i_g
    o_r = tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    b_q = tl.load(
        p_q + i_bg * R * D + o_r[:, None] * D + o_d[None, :],
        mask=(o_r < R)[:, None] & (o_d < D)[None, :],
        other=0.0,
    )
    p_k += i_b * s_b + i_g * s_g
    b_most = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_R], dtype=tl.float32)
    for start in range(0, n, BLOCK_J):
        o_j = start + tl.arange(0, BLOCK_J)
        b_k = tl.load(
            p_k + o_j.to(tl.int64)[:, None] * s_n + o_d[None, :],
            mask=(o_j < n)[:, None] & (o_d < D)[None, :],
            other=0.0,
        )
        b_l = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        b_l = tl.where((o_j < n)[None, :], b_l, float("-inf"))
        b_new = tl.maximum(b_most, tl.max(b_l, 1))
        b_sum = b_sum * tl.exp(b_most - b_new) + tl.sum(tl.exp(b_l - b_new[:, None]), 1)
        b_most = b_new
    b_near = b_most + tl.log(b_sum)
    o = tl.arange(0, WIDTH)
    m = o < count
    b_cost = tl.zeros([WIDTH], dtype=tl.float32)
    p_stats += i_bg * R * count + o
    for i_r in range(R):
        near = tl.sum(tl.where(o_r == i_r, b_near, 0.0), 0)
        b_top = tl.load(p_stats, mask=m, other=float("-inf"))
        b_mass = b_top + tl.log(tl.load(p_stats + s_part, mask=m, other=1.0))
        b_square = tl.load(p_stats + 2 * s_part, mask=m, other=0.0)
        b_mean = tl.load(p_stats + 3 * s_part, mask=m, other=float("-inf"))
        most = tl.maximum(tl.max(b_mass, 0), near)
        total = most + tl.log(tl.sum(tl.exp(b_mass - most), 0) + tl.exp(near - most))
        b_a = tl.exp(tl.minimum(b_mean - total, 0.0))
        b_r = b_square * tl.exp(2.0 * (b_top - total)) - 2.0 * b_a * tl.exp(b_mass - total)
        b_cost += tl.maximum(b_r + BLOCK * b_a * b_a, 0.0)
        p_stats += count
    b_cost = tl.where(m, b_cost / R, 0.0)
    low = -1
    high = 0x7F800000  # Of infinity, which is always too much.
    for _ in range(31):
        middle = low + (high - low) // 2
        b_left = tl.where(b_cost.to(tl.int32, bitcast=True) <= middle, b_cost, 0.0)
        fits = tl.sum(b_left, 0) <= allowed
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    b_kept = ((b_cost.to(tl.int32, bitcast=True) > low) & m).to(tl.int32)
    tl.store(p_kept + i_bg * count + o, b_kept.to(tl.int8), mask=m)
    tl.store(p_shown + i_bg, (tl.sum(b_kept, 0) * (BLOCK - 1) + count + n).to(tl.int64))


@triton.jit(do_not_specialize=["count", "room", "slots"])
def _mask_kernel(
    p_kept,
    p_expiry,
    count,
    room,
    slots,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    SEEN: tl.constexpr,
):
    """Show the summaries of blocks that are not kept, the keys of those that are, and the rest."""
    i_bg = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    of_key = o >= room
    o_page = tl.where(of_key, (o - room) // BLOCK, o)
    m_page = o_page < count
    b_kept = tl.load(p_kept + i_bg * count + o_page, mask=m_page & (o < slots), other=0) != 0
    b_seen = tl.where(m_page, b_kept == of_key, of_key)
    tl.store(p_expiry + i_bg * slots + o, tl.where(b_seen, SEEN, 0), mask=o < slots)
