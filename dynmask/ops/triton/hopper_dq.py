# mypy: disable-error-code="no-untyped-def"
"""dq on Hopper GPUs: a group of four warps holds half of the rows, and keys come by.

See `dynmask.ops.triton.hopper` for how copies and products overlap.
"""

from __future__ import annotations

from dynmask.ops.triton.gluon import (
    arrive_when_copied,
    barrier,
    gl,
    gluon,
    hopper,
    mbarrier,
)
from dynmask.ops.triton.hopper import copy_columns, gather_keys

# Rows of a computing group, and keys that come at a time.
ROWS = 64
BLOCK_N = 64


@gluon.jit(
    do_not_specialize=[
        "s_bb",
        "s_bg",
        "s_eb",
        "s_eg",
        "s_lb",
        "s_lg",
        "s_lt",
        "G",
        "Q",
        "K",
        "t0",
        "tiles",
    ]
)
def dq_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_expiry,
    p_do,
    p_lse,
    p_delta,
    p_keys,
    p_full,
    p_partial,
    p_dq,
    s_qb,
    s_qh,
    s_qn,
    s_kb,
    s_kg,
    s_kn,
    s_vb,
    s_vg,
    s_vn,
    s_db,
    s_dh,
    s_dn,
    s_bb,
    s_bg,
    s_eb,
    s_eg,
    s_ob,
    s_oh,
    s_on,
    s_lb,
    s_lg,
    s_lt,
    scale,
    G,
    Q,
    K,
    t0,
    tiles,
    R: gl.constexpr,
    D: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    LISTED: gl.constexpr,
    IMMORTAL: gl.constexpr,
    WIDE: gl.constexpr,
    TILE: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """Do what `dynmask.ops.triton.dq.dq_kernel` does."""
    dtype: gl.constexpr = p_q.dtype.element_ty
    parts: gl.constexpr = (TILE * R + 2 * ROWS - 1) // (2 * ROWS)
    i_t = tiles - 1 - gl.program_id(0) // parts
    i_part = gl.program_id(0) % parts
    i_b = (gl.program_id(1) // G).to(gl.int64)
    i_g = (gl.program_id(1) % G).to(gl.int64)
    p_q += i_b * s_qb + i_g * R * s_qh
    p_k += i_b * s_kb + i_g * s_kg
    p_v += i_b * s_vb + i_g * s_vg
    p_do += i_b * s_db + i_g * R * s_dh
    p_dq += i_b * s_ob + i_g * R * s_oh
    p_lse += (i_b * G + i_g) * R * Q
    p_delta += (i_b * G + i_g) * R * Q
    p_bias += i_b * s_bb + i_g * s_bg
    p_expiry += i_b * s_eb + i_g * s_eg
    if LISTED:
        p_keys += i_b * s_lb + i_g * s_lg + i_t * s_lt
    i_list = (i_b * G + i_g) * tiles + i_t
    a = (t0 + i_t) * TILE
    if LISTED:
        n_full = gl.load(p_full + i_list)
        total = n_full + gl.load(p_partial + i_list)
    else:
        total = gl.minimum(a + TILE, K)
        n_full = a + 1 if IMMORTAL else 0
    listed = (p_keys, n_full, total, s_lt - total, a)

    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], dtype)
    column_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(dtype, [2, ROWS, D], rows_layout)
    do_smem = gl.allocate_shared_memory(dtype, [2, ROWS, D], rows_layout)
    k_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_N, D], rows_layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_N, D], rows_layout)
    bias_smem = gl.allocate_shared_memory(gl.float32, [2, BLOCK_N], column_layout)
    limits_smem = gl.allocate_shared_memory(gl.int32, [2, BLOCK_N], column_layout)
    copied = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    limits = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(copied.index(i), count=128)
        mbarrier.init(limits.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    hopper.fence_async_shared()

    columns = (k_smem, v_smem, bias_smem, limits_smem)
    barriers = (copied, limits, free)
    rows = (p_q, s_qh, s_qn, p_do, s_dh, s_dn, p_dq, s_oh, s_on, p_lse, p_delta, Q, K, scale)
    first = i_part * 2 * ROWS
    mine = (q_smem.index(0), do_smem.index(0))
    yours = (q_smem.index(1), do_smem.index(1))
    gl.warp_specialize(
        [
            (_dq_compute, (mine, first, columns, barriers, listed, rows, R, HAS_BIAS, TILE)),
            (
                _dq_compute,
                (yours, first + ROWS, columns, barriers, listed, rows, R, HAS_BIAS, TILE),
            ),
            (
                _dq_copy,
                (
                    p_k,
                    s_kn,
                    p_v,
                    s_vn,
                    p_bias,
                    p_expiry,
                    columns,
                    barriers,
                    listed,
                    HAS_BIAS,
                    LISTED,
                    WIDE,
                    TILE,
                ),
            ),
        ],
        [4, 4],
        [224, 64],
    )


@gluon.jit
def _dq_copy(
    p_k,
    s_kn,
    p_v,
    s_vn,
    p_bias,
    p_expiry,
    columns,
    barriers,
    listed,
    HAS_BIAS: gl.constexpr,
    LISTED: gl.constexpr,
    WIDE: gl.constexpr,
    TILE: gl.constexpr,
):
    k_smem, v_smem, _, _ = columns
    copied, limits, free = barriers
    _, _, total, _, _ = listed
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    for block in range((total + BLOCK_N - 1) // BLOCK_N):
        i = block % 2
        copy_columns(columns, free, limits, p_bias, p_expiry, listed, block, HAS_BIAS, LISTED, TILE)
        gather_keys(k_smem.index(i), p_k, s_kn, listed, block, LISTED, WIDE)
        gather_keys(v_smem.index(i), p_v, s_vn, listed, block, LISTED, WIDE)
        arrive_when_copied(copied.index(i), increment_count=False)


@gluon.jit
def _dq_compute(
    own,
    first,
    columns,
    barriers,
    listed,
    rows,
    R: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    TILE: gl.constexpr,
):
    q_smem, do_smem = own
    k_smem, v_smem, bias_smem, limits_smem = columns
    copied, limits, free = barriers
    _, n_full, total, _, a = listed
    p_q, s_qh, s_qn, p_do, s_dh, s_dn, p_dq, s_oh, s_on, p_lse, p_delta, Q, K, scale = rows
    ROWS: gl.constexpr = q_smem.shape[0]
    D: gl.constexpr = q_smem.shape[1]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    dtype: gl.constexpr = q_smem.dtype
    moves: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    factors: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    row: gl.constexpr = gl.SliceLayout(1, logits)
    column: gl.constexpr = gl.SliceLayout(0, logits)

    o_m = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, moves))
    o_d = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, moves)), 0)
    o_q = (a + o_m // R - (K - Q)).to(gl.int64)
    m_m = (o_m < TILE * R) & (o_q >= 0) & (o_q < Q)
    m_md = gl.expand_dims(m_m, 1)
    p_bq = p_q + gl.expand_dims((o_m % R) * s_qh + o_q * s_qn, 1) + o_d
    p_bd = p_do + gl.expand_dims((o_m % R) * s_dh + o_q * s_dn, 1) + o_d
    q_smem.store(gl.load(p_bq, mask=m_md, other=0.0))
    do_smem.store(gl.load(p_bd, mask=m_md, other=0.0))

    o_r = first + gl.arange(0, ROWS, layout=row)
    o_row = o_r // R
    o_rq = a + o_row - (K - Q)
    m_r = (o_r < TILE * R) & (o_rq >= 0) & (o_rq < Q)
    o_rr = (o_r % R).to(gl.int64) * Q + o_rq
    b_lse = gl.load(p_lse + o_rr, mask=m_r, other=0.0) * 1.4426950408889634
    b_delta = gl.load(p_delta + o_rr, mask=m_r, other=0.0)
    scale_log2 = scale * 1.4426950408889634
    b_dq = gl.full([ROWS, D], 0.0, gl.float32, sums)
    zeros = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, logits)
    barrier()
    hopper.fence_async_shared()
    for block in range((total + BLOCK_N - 1) // BLOCK_N):
        i = block % 2
        mbarrier.wait(copied.index(i), block // 2 % 2)
        hopper.fence_async_shared()
        t_s = hopper.warpgroup_mma(
            q_smem, k_smem.index(i).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        t_dp = hopper.warpgroup_mma(
            do_smem, v_smem.index(i).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        b_s = hopper.warpgroup_mma_wait(1, deps=[t_s])
        b_s = b_s * scale_log2 - gl.expand_dims(b_lse, 1)
        if HAS_BIAS:
            b_s += gl.expand_dims(bias_smem.index(i).load(column) * 1.4426950408889634, 0)
        b_p = gl.exp2(b_s)
        if (block + 1) * BLOCK_N > n_full:
            mbarrier.wait(limits.index(i), (block // 2 - (n_full // BLOCK_N + 1 - i) // 2) % 2)
            b_limits = gl.expand_dims(limits_smem.index(i).load(column), 0)
            o_e = gl.expand_dims(o_row, 1)
            b_p = gl.where(((b_limits & 0xFFFF) <= o_e) & (o_e < (b_limits >> 16)), b_p, 0.0)
        b_dp = hopper.warpgroup_mma_wait(0, deps=[t_dp])
        b_ds = b_p * (b_dp - gl.expand_dims(b_delta, 1))
        b_a = gl.convert_layout(b_ds.to(dtype), factors)
        b_dq = hopper.warpgroup_mma(b_a, k_smem.index(i), b_dq)
        mbarrier.arrive(free.index(i), count=1)
    b_out = gl.convert_layout((b_dq * scale).to(dtype), moves)
    gl.store(p_dq + gl.expand_dims((o_m % R) * s_oh + o_q * s_on, 1) + o_d, b_out, mask=m_md)
