# mypy: disable-error-code="no-untyped-def"
"""dk, dv and dbias under stripes: columns share their rows out, other keys walk over tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynmask.ops.triton.common import padded_dim


def tiles(q: Tensor) -> tuple[int, int, int, int]:
    """Return keys, rows, warps and pipeline stages of a program."""
    dim = padded_dim(q.shape[-1])
    if q.dtype == torch.float32:
        return 32, 32 if dim <= 64 else 16, 8, 1
    if dim <= 128:
        return 128, 64, 8, 3 if dim <= 64 else 2
    return 64, 32, 8, 2


@triton.jit
def _dkdv_step(
    b_dk,
    b_dv,
    b_db,
    b_k,
    b_v,
    b_bias,
    p_q,
    p_do,
    p_lse,
    p_delta,
    o_q,
    m_q,
    m_s,
    o_d,
    s_qn,
    s_dn,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the rows ``o_q`` where ``m_q``; with MASKED, the pairs ``m_s`` only.

    A key whose bias is -inf gets nothing.
    """
    o_row = o_q.to(tl.int64) if WIDE else o_q
    m_qd = m_q[:, None] & (o_d < D)[None, :]
    b_q = tl.load(p_q + o_row[:, None] * s_qn + o_d[None, :], mask=m_qd, other=0.0)
    b_do = tl.load(p_do + o_row[:, None] * s_dn + o_d[None, :], mask=m_qd, other=0.0)
    b_lse = tl.load(p_lse + o_q, mask=m_q, other=float("inf"))
    b_delta = tl.load(p_delta + o_q, mask=m_q, other=0.0)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale_log2 + b_bias[:, None]
    b_p = tl.math.exp2(b_s - (b_lse * 1.4426950408889634)[None, :])
    if MASKED:
        b_p = tl.where(m_s, b_p, 0.0)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv, b_db + tl.sum(b_ds, 1)


@triton.jit(do_not_specialize=["first_bg", "first", "span", "width", "L"])
def columns_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_do,
    p_lse,
    p_delta,
    p_columns,
    p_column_runs,
    p_offset_runs,
    p_runs,
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
    scale,
    G,
    Q,
    K,
    L,
    first_bg,
    first,
    span,
    width,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum dk, dv and dbias of gathered columns of one head over one span of positions."""
    i_bg = first_bg + (tl.program_id(2) // R).to(tl.int64)
    i_b = i_bg // G
    i_g = i_bg % G
    i_h = i_g * R + tl.program_id(2) % R
    begin = 0
    length = K
    if PADDED:
        begin = tl.load(p_runs + 2 * i_b)
        length = tl.load(p_runs + 2 * i_b + 1) - begin
    shift = begin - (K - Q)
    o_c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # All keys of a full head are read where they stand.
    is_full = tl.load(p_offset_runs + 2 * i_h + 1) == 0
    count = tl.where(is_full, 0, tl.load(p_column_runs + 2 * i_h + 1))
    p_columns += tl.load(p_column_runs + 2 * i_h)
    o_j = tl.load(p_columns + o_c, mask=o_c < count, other=K)
    m_j = o_j < length
    if tl.min(o_j, 0) < length:
        o_d = tl.arange(0, BLOCK_D)
        m_jd = m_j[:, None] & (o_d < D)[None, :]
        o_slot = (begin + o_j).to(tl.int64)
        p_bk = p_k + i_b * s_kb + i_g * s_kg + o_slot[:, None] * s_kn + o_d[None, :]
        p_bv = p_v + i_b * s_vb + i_g * s_vg + o_slot[:, None] * s_vn + o_d[None, :]
        b_k = tl.load(p_bk, mask=m_jd, other=0.0)
        b_v = tl.load(p_bv, mask=m_jd, other=0.0)
        b_bias = tl.zeros([BLOCK_N], dtype=tl.float32)
        if HAS_BIAS:
            b_bias += tl.load(p_bias + i_b * s_bb + i_g * s_bg + o_slot, mask=m_j, other=0.0)
            b_bias *= 1.4426950408889634
        b_bias = tl.where(m_j, b_bias, float("-inf"))
        # Rows of the corner are left to the other kernel.
        a = first + tl.program_id(1) * span
        b = tl.minimum(a + span, length)
        a = tl.maximum(tl.maximum(a, tl.min(o_j, 0)), tl.maximum(-shift, L))
        p_q += i_b * s_qb + i_h * s_qh
        p_do += i_b * s_db + i_h * s_dh
        p_lse += (i_b * G * R + i_h) * Q
        p_delta += (i_b * G * R + i_h) * Q
        scale_log2 = scale * 1.4426950408889634
        b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        b_db = tl.zeros([BLOCK_N], dtype=tl.float32)
        for start in range(a, b, BLOCK_M):
            o_i = start + tl.arange(0, BLOCK_M)
            b_dk, b_dv, b_db = _dkdv_step(
                b_dk,
                b_dv,
                b_db,
                b_k,
                b_v,
                b_bias,
                p_q,
                p_do,
                p_lse,
                p_delta,
                o_i + shift,
                o_i < b,
                o_i[None, :] >= o_j[:, None],
                o_d,
                s_qn,
                s_dn,
                scale_log2,
                D,
                BLOCK_D,
                True,
                WIDE,
                PRECISION,
            )
        i_part = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        o_part = i_part * width + o_c
        p_part = o_part[:, None] * D + o_d[None, :]
        tl.store(p_part_dk + p_part, b_dk, mask=m_jd)
        tl.store(p_part_dv + p_part, b_dv, mask=m_jd)
        if HAS_BIAS:
            tl.store(p_part_db + o_part, b_db, mask=m_j)


@triton.jit(do_not_specialize=["first_bg", "first_tile", "splits", "width", "L"])
def keys_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_do,
    p_lse,
    p_delta,
    p_is_column,
    p_offset_runs,
    p_near,
    p_before,
    p_blocks,
    p_reached,
    p_corner,
    p_runs,
    p_part_dk,
    p_part_dv,
    p_part_db,
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
    scale,
    G,
    Q,
    K,
    S,
    L,
    first_bg,
    first_tile,
    splits,
    width,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CORNER: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Sum dk, dv and dbias of a tile of keys over its kv head's query heads, one after another.

    For each head: rows at its offsets (all rows if it is full), rows of the corner, and the sums of
    `columns_kernel` for keys that are columns.
    """
    i_t = first_tile + tl.program_id(0)
    i_bg = first_bg + tl.program_id(1).to(tl.int64)
    i_b = i_bg // G
    i_g = i_bg % G
    begin = 0
    length = K
    if PADDED:
        begin = tl.load(p_runs + 2 * i_b)
        length = tl.load(p_runs + 2 * i_b + 1) - begin
    # Positions count from the sequence's first token, rows of q from key slot K - Q.
    shift = begin - (K - Q)
    c = i_t * TILE
    if c >= length:
        return
    o_j = c + tl.arange(0, TILE)
    m_j = o_j < length
    o_d = tl.arange(0, BLOCK_D)
    m_jd = m_j[:, None] & (o_d < D)[None, :]
    o_slot = (begin + o_j).to(tl.int64)
    p_bk = p_k + i_b * s_kb + i_g * s_kg + o_slot[:, None] * s_kn + o_d[None, :]
    p_bv = p_v + i_b * s_vb + i_g * s_vg + o_slot[:, None] * s_vn + o_d[None, :]
    b_k = tl.load(p_bk, mask=m_jd, other=0.0)
    b_v = tl.load(p_bv, mask=m_jd, other=0.0)
    b_bias = tl.zeros([TILE], dtype=tl.float32)
    if HAS_BIAS:
        b_bias += tl.load(p_bias + i_b * s_bb + i_g * s_bg + o_slot, mask=m_j, other=0.0)
        b_bias *= 1.4426950408889634
    p_q += i_b * s_qb
    p_do += i_b * s_db
    scale_log2 = scale * 1.4426950408889634
    # Block m holds the rows from c + m BLOCK_M on: those with rows in [low, length).
    M = (S + TILE) // BLOCK_M
    low = tl.minimum(tl.maximum(-shift, L if HAS_CORNER else 0), length)
    m_low = tl.maximum(low - c, 0) // BLOCK_M
    m_high = tl.maximum((length - c + BLOCK_M - 1) // BLOCK_M, m_low)
    o_m = tl.arange(0, BLOCK_M)
    b_dk = tl.zeros([TILE, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([TILE, BLOCK_D], dtype=tl.float32)
    b_db = tl.zeros([TILE], dtype=tl.float32)
    for r in range(R):
        i_h = i_g * R + r
        p_hq = p_q + i_h * s_qh
        p_hd = p_do + i_h * s_dh
        p_hl = p_lse + (i_b * G * R + i_h) * Q
        p_ha = p_delta + (i_b * G * R + i_h) * Q
        n_offsets = tl.load(p_offset_runs + 2 * i_h + 1)
        is_full = n_offsets == 0
        column = tl.load(p_is_column + i_h * S + o_j, mask=m_j, other=0).to(tl.int32)
        column = tl.where(is_full, 0, column)
        is_column = column > 0
        is_other = m_j & (column == 0)
        b_other = tl.where(is_other, b_bias, float("-inf"))
        some = tl.max(is_other.to(tl.int32), 0) > 0
        p_full = p_blocks + i_h * 2 * M
        p_partial = p_full + M
        p_from = p_reached + i_h * 2 * (M + 1) + m_low
        p_to = p_reached + i_h * 2 * (M + 1) + m_high
        # A full head lists the blocks that reach into the tile only, and all later ones are full.
        n_low = tl.where(is_full, tl.maximum(m_low, TILE // BLOCK_M), tl.load(p_from))
        n_high = tl.where(some, tl.where(is_full, m_high, tl.load(p_to)), 0)
        for n in range(n_low, n_high):
            m = tl.where(is_full, n, tl.load(p_full + n, mask=n_offsets > 0, other=0))
            o_i = c + m * BLOCK_M + o_m
            m_i = (o_i >= low) & (o_i < length)
            b_dk, b_dv, b_db = _dkdv_step(
                b_dk,
                b_dv,
                b_db,
                b_k,
                b_v,
                b_other,
                p_hq,
                p_hd,
                p_hl,
                p_ha,
                o_i + shift,
                m_i,
                m_i[None, :],
                o_d,
                s_qn,
                s_dn,
                scale_log2,
                D,
                BLOCK_D,
                False,
                WIDE,
                PRECISION,
            )
        # Rows see all keys of a full head from a distance of 0 on, else none by that alone.
        far = tl.where(is_full, 0, S)
        n_low = tl.load(p_from + M + 1)
        n_high = tl.where(some, tl.load(p_to + M + 1), 0)
        # Read at -r for the offset r, at 1 and on for rows before the key.
        p_hn = p_near + i_h * (2 * S - 1) + S - 1
        for n in range(n_low, n_high):
            o_i = c + tl.load(p_partial + n) * BLOCK_M + o_m
            m_i = (o_i >= low) & (o_i < length)
            distance = tl.minimum(o_i, length - 1)[None, :] - o_j[:, None]
            m_s = (tl.load(p_hn - distance) != 0) | (distance >= far)
            b_dk, b_dv, b_db = _dkdv_step(
                b_dk,
                b_dv,
                b_db,
                b_k,
                b_v,
                b_other,
                p_hq,
                p_hd,
                p_hl,
                p_ha,
                o_i + shift,
                m_i,
                m_s,
                o_d,
                s_qn,
                s_dn,
                scale_log2,
                D,
                BLOCK_D,
                True,
                WIDE,
                PRECISION,
            )
        if HAS_CORNER:
            end = tl.minimum(L, length)
            for start in range(tl.maximum(c, -shift), end, BLOCK_M):
                o_i = start + o_m
                m_i = o_i < end
                m_s = m_i[None, :] & (o_i[None, :] >= o_j[:, None])
                p_bc = p_corner + i_h * L * L + o_i[None, :] * L + o_j[:, None]
                b_dk, b_dv, b_db = _dkdv_step(
                    b_dk,
                    b_dv,
                    b_db,
                    b_k,
                    b_v,
                    b_bias,
                    p_hq,
                    p_hd,
                    p_hl,
                    p_ha,
                    o_i + shift,
                    m_i,
                    tl.load(p_bc, mask=m_s, other=0) != 0,
                    o_d,
                    s_qn,
                    s_dn,
                    scale_log2,
                    D,
                    BLOCK_D,
                    True,
                    WIDE,
                    PRECISION,
                )
        if HAS_COLUMNS:
            rank = tl.load(p_before + i_h * (S // TILE + 1) + i_t) + tl.cumsum(column, 0) - 1
            m_c = is_column[:, None] & (o_d < D)[None, :]
            i_part = (tl.program_id(1).to(tl.int64) * R + r) * splits
            for i_s in range(0, tl.where(tl.max(column, 0) > 0, splits, 0)):
                o_part = (i_part + i_s) * width + rank
                p_part = o_part[:, None] * D + o_d[None, :]
                b_dk += tl.load(p_part_dk + p_part, mask=m_c, other=0.0)
                b_dv += tl.load(p_part_dv + p_part, mask=m_c, other=0.0)
                if HAS_BIAS:
                    b_db += tl.load(p_part_db + o_part, mask=is_column, other=0.0)
    o_to = i_bg * K + o_slot
    p_to = o_to[:, None] * D + o_d[None, :]
    tl.store(p_dk + p_to, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_jd)
    tl.store(p_dv + p_to, b_dv.to(p_dv.dtype.element_ty), mask=m_jd)
    if HAS_BIAS:
        tl.store(p_db + o_to, b_db, mask=m_j)
