# mypy: disable-error-code="no-untyped-def"
"""dq over the forward pass's lists: a program per block of packed rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dq_block(
    b_dq,
    b_q,
    b_do,
    b_lse,
    b_delta,
    p_k,
    p_v,
    p_bias,
    p_expiry,
    o_j,
    m_j,
    o_slot,
    o_d,
    s_kn,
    s_vn,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTIAL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_row = o_j.to(tl.int64) if WIDE else o_j
    p_bk = p_k + o_row[:, None] * s_kn + o_d[None, :]
    p_bv = p_v + o_row[:, None] * s_vn + o_d[None, :]
    if PARTIAL or D != BLOCK_D:
        m_jd = m_j[:, None] & (o_d < D)[None, :]
        b_k = tl.load(p_bk, mask=m_jd, other=0.0)
        b_v = tl.load(p_bv, mask=m_jd, other=0.0)
    else:
        b_k = tl.load(p_bk)
        b_v = tl.load(p_bv)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    if HAS_BIAS:
        b_bias = tl.load(p_bias + o_j, mask=m_j, other=0.0)
        b_s += (b_bias * 1.4426950408889634)[None, :]
    b_p = tl.math.exp2(b_s - b_lse[:, None])
    if PARTIAL:
        b_e = tl.load(p_expiry + o_j, mask=m_j, other=0)
        m_s = (o_j[None, :] <= o_slot[:, None]) & (o_slot[:, None] < b_e[None, :])
        b_p = tl.where(m_s & m_j[None, :], b_p, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit(
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
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    LISTED: tl.constexpr,
    IMMORTAL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum dq of one block of packed rows over its tile's keys."""
    parts = (TILE * R + BLOCK_M - 1) // BLOCK_M
    i_t = tl.program_id(0) // parts
    i_part = tl.program_id(0) % parts
    i_b = (tl.program_id(1) // G).to(tl.int64)
    i_g = (tl.program_id(1) % G).to(tl.int64)
    o_m = i_part * BLOCK_M + tl.arange(0, BLOCK_M)
    o_slot = (t0 + i_t) * TILE + o_m // R
    o_q = (o_slot - (K - Q)).to(tl.int64)
    o_h = i_g * R + o_m % R
    m_m = (o_m < TILE * R) & (o_q >= 0) & (o_q < Q)
    o_d = tl.arange(0, BLOCK_D)
    m_md = m_m[:, None] & (o_d < D)[None, :]
    p_bq = p_q + i_b * s_qb + o_h[:, None] * s_qh + o_q[:, None] * s_qn + o_d[None, :]
    p_bd = p_do + i_b * s_db + o_h[:, None] * s_dh + o_q[:, None] * s_dn + o_d[None, :]
    b_q = tl.load(p_bq, mask=m_md, other=0.0)
    b_do = tl.load(p_bd, mask=m_md, other=0.0)
    o_r = (i_b * G * R + o_h) * Q + o_q
    b_lse = tl.load(p_lse + o_r, mask=m_m, other=0.0) * 1.4426950408889634
    b_delta = tl.load(p_delta + o_r, mask=m_m, other=0.0)
    p_k += i_b * s_kb + i_g * s_kg
    p_v += i_b * s_vb + i_g * s_vg
    if HAS_BIAS:
        p_bias += i_b * s_bb + i_g * s_bg
    p_expiry += i_b * s_eb + i_g * s_eg
    if LISTED:
        p_keys += i_b * s_lb + i_g * s_lg + i_t * s_lt
    i_list = (i_b * G + i_g) * tiles + i_t
    a = (t0 + i_t) * TILE
    if LISTED:
        n_full = tl.load(p_full + i_list)
        total = n_full + tl.load(p_partial + i_list)
    else:
        n_full = a + 1 if IMMORTAL else 0
        total = tl.minimum(a + TILE, K)
    scale_log2 = scale * 1.4426950408889634
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    whole = n_full // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        o_j = start + tl.arange(0, BLOCK_N)
        if LISTED:
            o_j = tl.load(p_keys + o_j)
        b_dq = _dq_block(
            b_dq,
            b_q,
            b_do,
            b_lse,
            b_delta,
            p_k,
            p_v,
            p_bias,
            p_expiry,
            o_j,
            o_j >= 0,
            o_slot,
            o_d,
            s_kn,
            s_vn,
            scale_log2,
            D,
            BLOCK_D,
            HAS_BIAS,
            False,
            WIDE,
            PRECISION,
        )
    for start in range(whole, total, BLOCK_N):
        o_j = start + tl.arange(0, BLOCK_N)
        m_j = o_j < total
        if LISTED:
            jump = tl.where(o_j < n_full, 0, s_lt - total)
            o_j = tl.load(p_keys + o_j + jump, mask=m_j, other=0)
        b_dq = _dq_block(
            b_dq,
            b_q,
            b_do,
            b_lse,
            b_delta,
            p_k,
            p_v,
            p_bias,
            p_expiry,
            o_j,
            m_j,
            o_slot,
            o_d,
            s_kn,
            s_vn,
            scale_log2,
            D,
            BLOCK_D,
            HAS_BIAS,
            True,
            WIDE,
            PRECISION,
        )
    p_out = p_dq + i_b * s_ob + o_h[:, None] * s_oh + o_q[:, None] * s_on + o_d[None, :]
    tl.store(p_out, (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_md)
