# mypy: disable-error-code="no-untyped-def"
"""dk and dv on Hopper GPUs: a group of four warps holds half of the keys, and rows come by.

See `dynmask.ops.triton.hopper` for how copies and products overlap.
"""

from __future__ import annotations

from dynmask.ops.triton.gluon import (
    arrive_when_copied,
    async_load,
    barrier,
    gl,
    gluon,
    hopper,
    mbarrier,
)

# Keys of a computing group, and rows that come at a time.
KEYS = 64
BLOCK_M = 32


@gluon.jit(
    do_not_specialize=[
        "s_bb",
        "s_bg",
        "s_eb",
        "s_eg",
        "s_lb",
        "s_lg",
        "s_lu",
        "G",
        "Q",
        "K",
        "u0",
        "first_span",
        "spans",
        "width",
    ]
)
def dkdv_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_expiry,
    p_do,
    p_lse,
    p_delta,
    p_keys,
    p_count,
    p_dk,
    p_dv,
    p_db,
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
    s_lb,
    s_lg,
    s_lu,
    scale,
    G,
    Q,
    K,
    u0,
    first_span,
    spans,
    width,
    R: gl.constexpr,
    D: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    WIDE: gl.constexpr,
    SPAN: gl.constexpr,
    KEYS: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    """Do what `dynmask.ops.triton.dkdv.dkdv_kernel` does."""
    dtype: gl.constexpr = p_q.dtype.element_ty
    i_b = (gl.program_id(1) // G).to(gl.int64)
    i_g = (gl.program_id(1) % G).to(gl.int64)
    i_u = first_span + gl.program_id(2)
    count = gl.load(p_count + (i_b * G + i_g) * spans + i_u)
    first = gl.program_id(0) * 2 * KEYS
    if first >= count:
        return
    p_keys += i_b * s_lb + i_g * s_lg + i_u * s_lu
    p_expiry += i_b * s_eb + i_g * s_eg
    p_q += i_b * s_qb + i_g * R * s_qh
    p_do += i_b * s_db + i_g * R * s_dh
    p_k += i_b * s_kb + i_g * s_kg
    p_v += i_b * s_vb + i_g * s_vg
    p_bias += i_b * s_bb + i_g * s_bg
    p_lse += (i_b * G + i_g) * R * Q
    p_delta += (i_b * G + i_g) * R * Q
    i_sum = (gl.program_id(2).to(gl.int64) * gl.num_programs(1) + gl.program_id(1)) * width
    p_dk += i_sum * D
    p_dv += i_sum * D
    p_db += i_sum

    # Packed rows from the first to the last that see any key of the program.
    offset = K - Q
    a = gl.maximum((u0 + i_u) * SPAN, offset)
    b = gl.minimum((u0 + i_u + 1) * SPAN, K)
    column: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_l = first + gl.arange(0, 2 * KEYS, layout=column)
    o_j = gl.load(p_keys + o_l, mask=o_l < count, other=0)
    b_e = gl.load(p_expiry + o_j, mask=o_l < count, other=0)
    start = gl.min(gl.where(o_l < count, gl.maximum(o_j, a), b), 0) - offset
    end = gl.maximum(gl.max(gl.where(o_l < count, gl.minimum(b_e, b), a), 0), a) - offset
    m_first = start * R
    blocks = ((end - start) * R + BLOCK_M - 1) // BLOCK_M

    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, D], dtype)
    column_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_smem = gl.allocate_shared_memory(dtype, [2, KEYS, D], rows_layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, KEYS, D], rows_layout)
    q_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_M, D], rows_layout)
    do_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_M, D], rows_layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], column_layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], column_layout)
    copied = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(copied.index(i), count=128)
        mbarrier.init(free.index(i), count=2)
    hopper.fence_async_shared()

    streams = (q_smem, do_smem, lse_smem, delta_smem)
    barriers = (copied, free)
    span = (m_first, blocks, a, b, offset)
    keys = (p_keys, p_expiry, count, p_k, s_kn, p_v, s_vn, p_bias, p_dk, p_dv, p_db, scale)
    mine = (k_smem.index(0), v_smem.index(0))
    yours = (k_smem.index(1), v_smem.index(1))
    gl.warp_specialize(
        [
            (_dkdv_compute, (mine, first, streams, barriers, span, keys, R, HAS_BIAS, WIDE)),
            (
                _dkdv_compute,
                (yours, first + KEYS, streams, barriers, span, keys, R, HAS_BIAS, WIDE),
            ),
            (
                _dkdv_copy,
                (p_q, s_qh, s_qn, p_do, s_dh, s_dn, p_lse, p_delta, Q, streams, barriers, span, R),
            ),
        ],
        [4, 4],
        [232, 40],
    )


@gluon.jit
def _dkdv_copy(
    p_q,
    s_qh,
    s_qn,
    p_do,
    s_dh,
    s_dn,
    p_lse,
    p_delta,
    Q,
    streams,
    barriers,
    span,
    R: gl.constexpr,
):
    q_smem, do_smem, lse_smem, delta_smem = streams
    copied, free = barriers
    m_first, blocks, _, _, _ = span
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    column: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for block in range(blocks):
        i = block % 2
        m = m_first + block * BLOCK_M
        # Rows past the last are computed and hidden; they must be rows all the same.
        o_m = gl.minimum(m + gl.arange(0, BLOCK_M, layout=column), Q * R - 1)
        o_r = (o_m % R).to(gl.int64) * Q + o_m // R
        mbarrier.wait(free.index(i), (block // 2 + 1) % 2)
        async_load(lse_smem.index(i), p_lse + o_r)
        async_load(delta_smem.index(i), p_delta + o_r)
        _copy_rows(q_smem.index(i), p_q, s_qh, s_qn, m, Q, R)
        _copy_rows(do_smem.index(i), p_do, s_dh, s_dn, m, Q, R)
        arrive_when_copied(copied.index(i), increment_count=False)


@gluon.jit
def _copy_rows(smem, p_rows, s_h, s_n, m, Q, R: gl.constexpr):
    BLOCK_M: gl.constexpr = smem.shape[0]
    D: gl.constexpr = smem.shape[1]
    STEP: gl.constexpr = 32
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, copies))
    for step in gl.static_range(BLOCK_M // STEP):
        o_m = m + step * STEP + gl.arange(0, STEP, layout=gl.SliceLayout(1, copies))
        o_m = gl.minimum(o_m, Q * R - 1)
        o_row = (o_m % R).to(gl.int64) * s_h + (o_m // R).to(gl.int64) * s_n
        p = p_rows + gl.expand_dims(o_row, 1) + gl.expand_dims(o_d, 0)
        async_load(smem.slice(step * STEP, STEP), p)


@gluon.jit
def _dkdv_compute(
    own,
    first,
    streams,
    barriers,
    span,
    keys,
    R: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    WIDE: gl.constexpr,
):
    k_smem, v_smem = own
    q_smem, do_smem, lse_smem, delta_smem = streams
    copied, free = barriers
    m_first, blocks, a, b, offset = span
    p_keys, p_expiry, count, p_k, s_kn, p_v, s_vn, p_bias, p_dk, p_dv, p_db, scale = keys
    KEYS: gl.constexpr = k_smem.shape[0]
    D: gl.constexpr = k_smem.shape[1]
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    dtype: gl.constexpr = k_smem.dtype
    moves: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    factors: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    key: gl.constexpr = gl.SliceLayout(1, logits)
    row: gl.constexpr = gl.SliceLayout(0, logits)

    o_d = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, moves)), 0)
    o_l = first + gl.arange(0, KEYS, layout=gl.SliceLayout(1, moves))
    m_l = gl.expand_dims(o_l < count, 1)
    o_j = gl.load(p_keys + o_l, mask=o_l < count, other=0).to(gl.int64)
    k_smem.store(gl.load(p_k + gl.expand_dims(o_j * s_kn, 1) + o_d, mask=m_l, other=0.0))
    v_smem.store(gl.load(p_v + gl.expand_dims(o_j * s_vn, 1) + o_d, mask=m_l, other=0.0))

    o_c = first + gl.arange(0, KEYS, layout=key)
    m_c = o_c < count
    o_k = gl.load(p_keys + o_c, mask=m_c, other=0)
    b_e = gl.load(p_expiry + o_k, mask=m_c, other=0)
    # Packed rows that see each key, and those that see all keys of the group.
    birth = gl.where(m_c, gl.maximum(o_k, a) - offset, b - offset) * R
    death = gl.where(m_c, gl.minimum(b_e, b) - offset, a - offset) * R
    all_first = gl.max(birth, 0)
    all_last = gl.min(death, 0)
    b_bias = gl.full([KEYS], 0.0, gl.float32, key)
    if HAS_BIAS:
        b_bias = gl.load(p_bias + o_k, mask=m_c, other=0.0) * 1.4426950408889634
    scale_log2 = scale * 1.4426950408889634
    b_dk = gl.full([KEYS, D], 0.0, gl.float32, sums)
    b_dv = gl.full([KEYS, D], 0.0, gl.float32, sums)
    b_db = gl.full([KEYS], 0.0, gl.float32, key)
    zeros = gl.full([KEYS, BLOCK_M], 0.0, gl.float32, logits)
    barrier()
    hopper.fence_async_shared()
    for block in range(blocks):
        i = block % 2
        m = m_first + block * BLOCK_M
        mbarrier.wait(copied.index(i), block // 2 % 2)
        hopper.fence_async_shared()
        t_s = hopper.warpgroup_mma(
            k_smem, q_smem.index(i).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        t_dp = hopper.warpgroup_mma(
            v_smem, do_smem.index(i).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        b_lse = gl.expand_dims(lse_smem.index(i).load(row), 0) * 1.4426950408889634
        b_s = hopper.warpgroup_mma_wait(1, deps=[t_s])
        b_p = gl.exp2(b_s * scale_log2 + gl.expand_dims(b_bias, 1) - b_lse)
        if (m < all_first) | (m + BLOCK_M > all_last):
            o_m = gl.expand_dims(m + gl.arange(0, BLOCK_M, layout=row), 0)
            seen = (gl.expand_dims(birth, 1) <= o_m) & (o_m < gl.expand_dims(death, 1))
            b_p = gl.where(seen, b_p, 0.0)
        t_dv = hopper.warpgroup_mma(
            gl.convert_layout(b_p.to(dtype), factors), do_smem.index(i), b_dv, is_async=True
        )
        b_delta = gl.expand_dims(delta_smem.index(i).load(row), 0)
        b_dp = hopper.warpgroup_mma_wait(1, deps=[t_dp])
        b_ds = b_p * (b_dp - b_delta)
        if HAS_BIAS:
            b_db += gl.sum(b_ds, 1)
        b_a = gl.convert_layout(b_ds.to(dtype), factors)
        t_dk = hopper.warpgroup_mma(b_a, q_smem.index(i), b_dk, is_async=True)
        b_dv = hopper.warpgroup_mma_wait(1, deps=[t_dv])
        b_dk = hopper.warpgroup_mma_wait(0, deps=[t_dk])
        mbarrier.arrive(free.index(i), count=1)

    o_s = first + gl.arange(0, KEYS, layout=gl.SliceLayout(1, sums))
    o_sd = gl.expand_dims(o_s * D, 1) + gl.expand_dims(
        gl.arange(0, D, layout=gl.SliceLayout(0, sums)), 0
    )
    m_s = gl.expand_dims(o_s < count, 1)
    gl.store(p_dk + o_sd, b_dk * scale, mask=m_s)
    gl.store(p_dv + o_sd, b_dv, mask=m_s)
    if HAS_BIAS:
        gl.store(p_db + o_c, b_db, mask=m_c)
