# mypy: disable-error-code="no-untyped-def"
"""dk, dv and dbias: a program per block of keys that live alike, over one span of rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dkdv_block(
    b_dk,
    b_dv,
    b_db,
    b_k,
    b_v,
    b_bias,
    o_first,
    o_last,
    p_q,
    p_do,
    p_lse,
    p_delta,
    o_m,
    Q,
    offset,
    o_d,
    s_qh,
    s_qn,
    s_dh,
    s_dn,
    scale_log2,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTIAL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one block of packed rows ``o_m`` to a block of keys."""
    o_h = o_m % R
    o_q = o_m // R
    # Offsets of a batch row that pass 2^31 need 64 bits, which cost registers.
    o_h64 = o_h.to(tl.int64) if WIDE else o_h
    o_q64 = o_q.to(tl.int64) if WIDE else o_q
    o_r = o_h64 * Q + o_q64
    p_bq = p_q + (o_h64 * s_qh + o_q64 * s_qn)[:, None] + o_d[None, :]
    p_bd = p_do + (o_h64 * s_dh + o_q64 * s_dn)[:, None] + o_d[None, :]
    if PARTIAL or D != BLOCK_D:
        m_m = o_q < Q
        m_md = m_m[:, None] & (o_d < D)[None, :]
        b_q = tl.load(p_bq, mask=m_md, other=0.0)
        b_do = tl.load(p_bd, mask=m_md, other=0.0)
        b_lse = tl.load(p_lse + o_r, mask=m_m, other=0.0)
        b_delta = tl.load(p_delta + o_r, mask=m_m, other=0.0)
    else:
        b_q = tl.load(p_bq)
        b_do = tl.load(p_bd)
        b_lse = tl.load(p_lse + o_r)
        b_delta = tl.load(p_delta + o_r)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale_log2 + b_bias[:, None]
    b_p = tl.math.exp2(b_s - (b_lse * 1.4426950408889634)[None, :])
    if PARTIAL:
        o_slot = o_q + offset
        m_s = (o_first[:, None] <= o_slot[None, :]) & (o_slot[None, :] < o_last[:, None])
        b_p = tl.where(m_s, b_p, 0.0)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv, b_db + tl.sum(b_ds, 1)


@triton.jit(
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
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum dk, dv and dbias of one block of a span's keys over that span's rows."""
    i_b = (tl.program_id(1) // G).to(tl.int64)
    i_g = (tl.program_id(1) % G).to(tl.int64)
    i_u = first_span + tl.program_id(2)
    count = tl.load(p_count + (i_b * G + i_g) * spans + i_u)
    o_l = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_j = o_l < count
    if tl.program_id(0) * BLOCK_N < count:
        p_keys += i_b * s_lb + i_g * s_lg + i_u * s_lu
        o_j = tl.load(p_keys + o_l, mask=m_j, other=0)
        b_e = tl.load(p_expiry + i_b * s_eb + i_g * s_eg + o_j, mask=m_j, other=0)
        o_d = tl.arange(0, BLOCK_D)
        o_row = o_j.to(tl.int64) if WIDE else o_j
        m_jd = m_j[:, None] & (o_d < D)[None, :]
        p_bk = p_k + i_b * s_kb + i_g * s_kg + o_row[:, None] * s_kn + o_d[None, :]
        p_bv = p_v + i_b * s_vb + i_g * s_vg + o_row[:, None] * s_vn + o_d[None, :]
        b_k = tl.load(p_bk, mask=m_jd, other=0.0)
        b_v = tl.load(p_bv, mask=m_jd, other=0.0)
        b_bias = tl.zeros([BLOCK_N], dtype=tl.float32)
        if HAS_BIAS:
            b_bias += tl.load(p_bias + i_b * s_bb + i_g * s_bg + o_j, mask=m_j, other=0.0)
            b_bias *= 1.4426950408889634
        # Packed rows: the first and last that see any key, and those between that see all.
        offset = K - Q
        a = tl.maximum((u0 + i_u) * SPAN, offset)
        b = tl.minimum((u0 + i_u + 1) * SPAN, K)
        o_first = tl.where(m_j, tl.maximum(o_j, a), b)
        o_last = tl.where(m_j, tl.maximum(tl.minimum(b_e, b), a), a)
        first = (tl.min(o_first, 0) - offset) * R // BLOCK_M * BLOCK_M
        last = (tl.max(o_last, 0) - offset) * R
        all_first = tl.max(o_first, 0) - offset
        all_last = tl.min(o_last, 0) - offset
        head = tl.minimum((all_first * R + BLOCK_M - 1) // BLOCK_M * BLOCK_M, last)
        tail = tl.maximum(all_last * R // BLOCK_M * BLOCK_M, head)
        p_q += i_b * s_qb + i_g * R * s_qh
        p_do += i_b * s_db + i_g * R * s_dh
        p_lse += (i_b * G + i_g) * R * Q
        p_delta += (i_b * G + i_g) * R * Q
        scale_log2 = scale * 1.4426950408889634
        b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        b_db = tl.zeros([BLOCK_N], dtype=tl.float32)
        for part in tl.static_range(3):
            begin = first if part == 0 else (head if part == 1 else tail)
            end = head if part == 0 else (tail if part == 1 else last)
            for start in range(begin, end, BLOCK_M):
                b_dk, b_dv, b_db = dkdv_block(
                    b_dk,
                    b_dv,
                    b_db,
                    b_k,
                    b_v,
                    b_bias,
                    o_first,
                    o_last,
                    p_q,
                    p_do,
                    p_lse,
                    p_delta,
                    start + tl.arange(0, BLOCK_M),
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
                    part != 1,
                    WIDE,
                    PRECISION,
                )
        i_sum = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * width
        o_sum = (i_sum + o_l)[:, None] * D + o_d[None, :]
        tl.store(p_dk + o_sum, b_dk * scale, mask=m_jd)
        tl.store(p_dv + o_sum, b_dv, mask=m_jd)
        if HAS_BIAS:
            tl.store(p_db + i_sum + o_l, b_db, mask=m_j)


@triton.jit(do_not_specialize=["s_lb", "s_lg", "s_lu", "G", "K", "i_u", "i_part", "spans", "width"])
def add_kernel(
    p_keys,
    p_count,
    p_part_dk,
    p_part_dv,
    p_part_db,
    p_dk,
    p_dv,
    p_db,
    s_lb,
    s_lg,
    s_lu,
    G,
    K,
    i_u,
    i_part,
    spans,
    width,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add one span's sums to those of its keys; a key is in a span once."""
    i_bg = tl.program_id(1).to(tl.int64)
    count = tl.load(p_count + i_bg * spans + i_u)
    o_l = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.program_id(0) * BLOCK_N < count:
        m_j = o_l < count
        o_d = tl.arange(0, BLOCK_D)
        m_jd = m_j[:, None] & (o_d < D)[None, :]
        p_keys += (i_bg // G) * s_lb + (i_bg % G) * s_lg + i_u * s_lu
        o_j = i_bg * K + tl.load(p_keys + o_l, mask=m_j, other=0)
        o_part = (i_part * tl.num_programs(1) + i_bg) * width + o_l
        o_to = o_j[:, None] * D + o_d[None, :]
        o_from = o_part[:, None] * D + o_d[None, :]
        b_dk = tl.load(p_part_dk + o_from, mask=m_jd) + tl.load(p_dk + o_to, mask=m_jd)
        b_dv = tl.load(p_part_dv + o_from, mask=m_jd) + tl.load(p_dv + o_to, mask=m_jd)
        tl.store(p_dk + o_to, b_dk, mask=m_jd)
        tl.store(p_dv + o_to, b_dv, mask=m_jd)
        if HAS_BIAS:
            b_db = tl.load(p_part_db + o_part, mask=m_j) + tl.load(p_db + o_j, mask=m_j)
            tl.store(p_db + o_j, b_db, mask=m_j)
