# mypy: disable-error-code="no-untyped-def"
"""dk, dv and dbias under blocks: a program per slice of a key block and run of its query tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from dynmask.ops.triton.dkdv import dkdv_block


@triton.jit(
    do_not_specialize=[
        "s_bb",
        "s_bg",
        "s_eb",
        "s_eg",
        "s_lb",
        "s_lg",
        "G",
        "Q",
        "K",
        "N",
        "block",
        "width",
        "run",
        "parts",
    ]
)
def blocks_dkdv_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_expiry,
    p_do,
    p_lse,
    p_delta,
    p_tiles,
    p_begin,
    p_block,
    p_first,
    p_part,
    p_dk,
    p_dv,
    p_db,
    p_part_dk,
    p_part_dv,
    p_part_db,
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
    scale,
    G,
    Q,
    K,
    N,
    block,
    width,
    run,
    parts,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum over the rows of up to ``run`` tiles; a block with more goes to parts, one for each."""
    slices = (block + BLOCK_N - 1) // BLOCK_N
    i_w = tl.program_id(0) // slices
    i_bg = tl.program_id(1).to(tl.int64)
    i_b = i_bg // G
    i_g = i_bg % G
    i_list = i_b * s_lb + i_g * s_lg
    i_n = tl.load(p_block + i_list * (tl.num_programs(0) // slices) + i_w)
    # The grid has room for the most programs that there may be.
    if i_n < N:
        p_begin += i_list * (N + 1) + i_n
        i_run = i_w - tl.load(p_first + i_list * N + i_n)
        i_part = tl.load(p_part + i_list * N + i_n)
        low = tl.load(p_begin) + i_run * run
        count = tl.minimum(tl.load(p_begin + 1) - low, run)
        at = (tl.program_id(0) % slices) * BLOCK_N
        # The last block may reach beyond the last key.
        count = tl.where(i_n * block + at < K, count, 0)
        o_in = at + tl.arange(0, BLOCK_N)
        o_j = i_n * block + o_in
        m_j = (o_in < block) & (o_j < K)
        o_d = tl.arange(0, BLOCK_D)
        m_jd = m_j[:, None] & (o_d < D)[None, :]
        o_row = o_j.to(tl.int64) if WIDE else o_j
        p_bk = p_k + i_b * s_kb + i_g * s_kg + o_row[:, None] * s_kn + o_d[None, :]
        p_bv = p_v + i_b * s_vb + i_g * s_vg + o_row[:, None] * s_vn + o_d[None, :]
        b_k = tl.load(p_bk, mask=m_jd, other=0.0)
        b_v = tl.load(p_bv, mask=m_jd, other=0.0)
        b_bias = tl.zeros([BLOCK_N], dtype=tl.float32)
        if HAS_BIAS:
            b_bias += tl.load(p_bias + i_b * s_bb + i_g * s_bg + o_j, mask=m_j, other=0.0)
            b_bias *= 1.4426950408889634
        # A key that is padding, or behind the block's end, is dead before any row.
        o_last = tl.load(p_expiry + i_b * s_eb + i_g * s_eg + o_j, mask=m_j, other=0)
        o_last = tl.minimum(o_last, K)
        offset = K - Q
        p_tiles += i_list * width + low
        p_q += i_b * s_qb + i_g * R * s_qh
        p_do += i_b * s_db + i_g * R * s_dh
        p_lse += i_bg * R * Q
        p_delta += i_bg * R * Q
        scale_log2 = scale * 1.4426950408889634
        b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        b_db = tl.zeros([BLOCK_N], dtype=tl.float32)
        # Rows are packed tile after tile, in a tile token after token, for a token head after head.
        total = count * (TILE * R)
        for start in range(0, total, BLOCK_M):
            o = start + tl.arange(0, BLOCK_M)
            o_t = tl.load(p_tiles + o // (TILE * R), mask=o < total, other=0)
            o_q = o_t * TILE + o % (TILE * R) // R - offset
            m_q = (o < total) & (o_q >= 0)
            b_dk, b_dv, b_db = dkdv_block(
                b_dk,
                b_dv,
                b_db,
                b_k,
                b_v,
                b_bias,
                o_j,
                o_last,
                p_q,
                p_do,
                p_lse,
                p_delta,
                tl.where(m_q, o_q * R + o % R, Q * R),
                Q,
                offset,
                o_d,
                s_qh,
                s_qn,
                s_dh,
                s_dn,
                scale_log2,
                R,
                D,
                BLOCK_D,
                True,
                WIDE,
                PRECISION,
            )
        b_dk *= scale
        if i_part < 0:
            o_to = i_bg * K + o_j
            p_to = o_to[:, None] * D + o_d[None, :]
            tl.store(p_dk + p_to, b_dk.to(p_dk.dtype.element_ty), mask=m_jd)
            tl.store(p_dv + p_to, b_dv.to(p_dv.dtype.element_ty), mask=m_jd)
            if HAS_BIAS:
                tl.store(p_db + o_to, b_db, mask=m_j)
        else:
            o_to = (i_bg * parts + i_part + i_run) * block + o_in
            p_to = o_to[:, None] * D + o_d[None, :]
            tl.store(p_part_dk + p_to, b_dk, mask=m_jd)
            tl.store(p_part_dv + p_to, b_dv, mask=m_jd)
            if HAS_BIAS:
                tl.store(p_part_db + o_to, b_db, mask=m_j)


@triton.jit(do_not_specialize=["s_lb", "s_lg", "G", "K", "N", "block", "run", "parts"])
def add_parts_kernel(
    p_begin,
    p_part,
    p_dk,
    p_dv,
    p_db,
    p_part_dk,
    p_part_dv,
    p_part_db,
    s_lb,
    s_lg,
    G,
    K,
    N,
    block,
    run,
    parts,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the parts of a block that has some, one after another."""
    slices = (block + BLOCK_N - 1) // BLOCK_N
    i_n = tl.program_id(0) // slices
    i_bg = tl.program_id(1).to(tl.int64)
    i_list = i_bg // G * s_lb + i_bg % G * s_lg
    i_part = tl.load(p_part + i_list * N + i_n)
    if i_part >= 0:
        p_begin += i_list * (N + 1) + i_n
        count = (tl.load(p_begin + 1) - tl.load(p_begin) + run - 1) // run
        o_in = (tl.program_id(0) % slices) * BLOCK_N + tl.arange(0, BLOCK_N)
        o_j = i_n * block + o_in
        m_j = (o_in < block) & (o_j < K)
        o_d = tl.arange(0, BLOCK_D)
        m_jd = m_j[:, None] & (o_d < D)[None, :]
        b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        b_db = tl.zeros([BLOCK_N], dtype=tl.float32)
        for i_run in range(0, count):
            o_from = (i_bg * parts + i_part + i_run) * block + o_in
            p_from = o_from[:, None] * D + o_d[None, :]
            b_dk += tl.load(p_part_dk + p_from, mask=m_jd, other=0.0)
            b_dv += tl.load(p_part_dv + p_from, mask=m_jd, other=0.0)
            if HAS_BIAS:
                b_db += tl.load(p_part_db + o_from, mask=m_j, other=0.0)
        o_to = i_bg * K + o_j
        p_to = o_to[:, None] * D + o_d[None, :]
        tl.store(p_dk + p_to, b_dk.to(p_dk.dtype.element_ty), mask=m_jd)
        tl.store(p_dv + p_to, b_dv.to(p_dv.dtype.element_ty), mask=m_jd)
        if HAS_BIAS:
            tl.store(p_db + o_to, b_db, mask=m_j)
