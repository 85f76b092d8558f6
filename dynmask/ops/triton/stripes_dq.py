# mypy: disable-error-code="no-untyped-def"
"""dq under stripes: a program per tile of rows, over the keys that the forward pass reads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynmask.ops.triton.common import dot_precision, int32_offsets, padded_dim
from dynmask.ops.triton.stripes_tables import StripeKeys, TileTables


def tiles(q: Tensor) -> tuple[int, int, int, int]:
    """Return rows, keys, warps and pipeline stages of a program."""
    dim = padded_dim(q.shape[-1])
    if q.dtype == torch.float32:
        return 32, 32 if dim <= 128 else 16, 8, 1
    return (128, 64, 8, 3) if dim <= 128 else (64, 32, 8, 2)


def query_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    keys: StripeKeys,
    tables: TileTables,
    corner: Tensor | None,
    runs: Tensor | None,
    dq: Tensor,
    scale: float,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    *,
    first: int,
    last: int,
) -> None:
    """Write dq in the rows of tiles ``first`` to ``last - 1`` of each sequence.

    Args:
        q: As in `dynmask.ops.triton.stripes_forward.forward`, and so for the others up to runs.
        k: See there.
        v: See there.
        bias: See there.
        keys: See there.
        tables: The mask's, for `tiles`.
        corner: See there.
        runs: See there.
        dq: ``[B, H, Q, D]``, last stride 1; padding rows are not written.
        scale: Factor of the logits.
        grad: ``[B, H, Q, D]``, gradient in the output, last stride 1.
        lse: Of `dynmask.ops.triton.backward.softmax_terms`.
        delta: Of the same.
        first: First tile.
        last: One past the last tile.
    """
    batch, heads, q_len, dim = q.shape
    groups, k_len = k.shape[1], k.shape[2]
    tile, block, warps, stages = tiles(q)
    _stripes_dq_kernel[(last - first, heads, batch)](
        q,
        k,
        v,
        bias,
        grad,
        lse,
        delta,
        keys.is_column,
        keys.columns,
        keys.column_runs,
        *tables,
        corner,
        runs,
        dq,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *grad.stride()[:3],
        *dq.stride()[:3],
        *((0, 0) if bias is None else bias.stride()[:2]),
        scale,
        heads // groups,
        q_len,
        k_len,
        last,
        keys.is_column.shape[1],
        0 if corner is None else corner.shape[1],
        D=dim,
        BLOCK_D=padded_dim(dim),
        HAS_BIAS=bias is not None,
        HAS_CORNER=corner is not None,
        PADDED=runs is not None,
        WIDE=not int32_offsets(k, v),
        PRECISION=dot_precision(q),
        TILE=tile,
        BLOCK_N=block,
        num_warps=warps,
        num_stages=stages,
    )


@triton.jit
def _dq_step(
    b_dq,
    b_q,
    b_do,
    b_lse,
    b_delta,
    p_k,
    p_v,
    p_bias,
    o_j,
    m_s,
    o_d,
    s_kn,
    s_vn,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the keys ``o_j``; with MASKED, the pairs ``m_s`` only."""
    o_row = o_j.to(tl.int64) if WIDE else o_j
    p_bk = p_k + o_row[:, None] * s_kn + o_d[None, :]
    p_bv = p_v + o_row[:, None] * s_vn + o_d[None, :]
    b_k = tl.load(p_bk) if D == BLOCK_D else tl.load(p_bk, mask=(o_d < D)[None, :], other=0.0)
    b_v = tl.load(p_bv) if D == BLOCK_D else tl.load(p_bv, mask=(o_d < D)[None, :], other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    if HAS_BIAS:
        b_s += (tl.load(p_bias + o_j) * 1.4426950408889634)[None, :]
    b_p = tl.math.exp2(b_s - b_lse[:, None])
    if MASKED:
        b_p = tl.where(m_s, b_p, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def _stripes_dq_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_do,
    p_lse,
    p_delta,
    p_is_column,
    p_columns,
    p_column_runs,
    p_near,
    p_before,
    p_blocks,
    p_reached,
    p_corner,
    p_runs,
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
    s_ob,
    s_oh,
    s_on,
    s_bb,
    s_bg,
    scale,
    R,
    Q,
    K,
    last,
    S,
    L,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CORNER: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Walk over keys as ``_stripes_kernel`` of the forward pass does."""
    i_t = last - 1 - tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_g = i_h // R
    begin = 0
    length = K
    if PADDED:
        begin = tl.load(p_runs + 2 * i_b)
        length = tl.load(p_runs + 2 * i_b + 1) - begin
    a = i_t * TILE
    # Positions count from the sequence's first token, rows of q from key slot K - Q.
    shift = begin - (K - Q)
    if (a >= length) | (a + TILE + shift <= 0):
        return
    o_i = a + tl.arange(0, TILE)
    o_q = (o_i + shift).to(tl.int64)
    m_m = (o_q >= 0) & (o_i < length)
    o_d = tl.arange(0, BLOCK_D)
    m_md = m_m[:, None] & (o_d < D)[None, :]
    p_bq = p_q + i_b * s_qb + i_h * s_qh + o_q[:, None] * s_qn + o_d[None, :]
    p_bd = p_do + i_b * s_db + i_h * s_dh + o_q[:, None] * s_dn + o_d[None, :]
    b_q = tl.load(p_bq, mask=m_md, other=0.0)
    b_do = tl.load(p_bd, mask=m_md, other=0.0)
    o_r = (i_b * tl.num_programs(1) + i_h) * Q + o_q
    b_lse = tl.load(p_lse + o_r, mask=m_m, other=0.0) * 1.4426950408889634
    b_delta = tl.load(p_delta + o_r, mask=m_m, other=0.0)
    p_k += i_b * s_kb + i_g * s_kg
    p_v += i_b * s_vb + i_g * s_vg
    if PADDED:
        o_begin = tl.cast(begin, tl.int64)
        p_k += o_begin * s_kn
        p_v += o_begin * s_vn
    if HAS_BIAS:
        p_bias += i_b * s_bb + i_g * s_bg + begin
    p_is_column += i_h * S
    p_near += i_h * (2 * S - 1) + S - 1
    scale_log2 = scale * 1.4426950408889634
    b_dq = tl.zeros([TILE, BLOCK_D], dtype=tl.float32)
    o_n = tl.arange(0, BLOCK_N)
    if HAS_CORNER:
        p_corner += i_h * L * L
        n_partial = (a + TILE) // BLOCK_N
    else:
        M = (S + TILE) // BLOCK_N
        m_near = (a + TILE) // BLOCK_N
        p_full = p_blocks + i_h * 2 * M
        p_partial = p_full + M
        p_reached += i_h * 2 * (M + 1) + m_near
        n_full = tl.load(p_reached)
        n_partial = tl.load(p_reached + M + 1)
        p_columns += tl.load(p_column_runs + 2 * i_h)
        n_columns = tl.load(p_before + i_h * (S // TILE + 1) + i_t)
        whole = n_columns // BLOCK_N * BLOCK_N
        for start in range(0, whole, BLOCK_N):
            o_j = tl.load(p_columns + start + o_n)
            b_dq = _dq_step(
                b_dq,
                b_q,
                b_do,
                b_lse,
                b_delta,
                p_k,
                p_v,
                p_bias,
                o_j,
                o_j >= 0,
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
        for n in range(tl.where(whole < n_columns, -1, 0), n_full):
            m = tl.load(p_full + n, mask=n >= 0, other=0)
            o_c = whole + o_n
            left = tl.load(p_columns + o_c, mask=(n < 0) & (o_c < n_columns), other=-1)
            o_k = tl.where(n < 0, left, a + TILE - (m + 1) * BLOCK_N + o_n)
            o_j = tl.maximum(o_k, 0)
            is_column = tl.load(p_is_column + o_j) != 0
            m_j = (o_k >= 0) & ((n < 0) | (is_column == 0))
            b_dq = _dq_step(
                b_dq,
                b_q,
                b_do,
                b_lse,
                b_delta,
                p_k,
                p_v,
                p_bias,
                o_j,
                m_j[None, :],
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
    for n in range(0, n_partial):
        m = n
        if not HAS_CORNER:
            m = tl.load(p_partial + n)
        o_k = a + TILE - (m + 1) * BLOCK_N + o_n
        o_j = tl.minimum(tl.maximum(o_k, 0), length - 1)
        distance = o_i[:, None] - o_j[None, :]
        m_s = tl.load(p_near - distance) != 0
        is_column = tl.load(p_is_column + o_j) != 0
        m_j = o_k == o_j
        if HAS_CORNER:
            m_s = m_s | (is_column[None, :] & (distance >= 0))
            m_corner = (o_i < L)[:, None] & (distance >= 0)
            p_bc = p_corner + o_i[:, None] * L + o_j[None, :]
            b_corner = tl.load(p_bc, mask=m_corner, other=0) != 0
            m_s = tl.where((o_i < L)[:, None], b_corner, m_s)
        else:
            m_s = m_s | ((is_column & (o_j >= a))[None, :] & (distance >= 0))
            m_j = m_j & ((is_column == 0) | (o_j >= a))
        b_dq = _dq_step(
            b_dq,
            b_q,
            b_do,
            b_lse,
            b_delta,
            p_k,
            p_v,
            p_bias,
            o_j,
            m_s & m_j[None, :],
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
    p_out = p_dq + i_b * s_ob + i_h * s_oh + o_q[:, None] * s_on + o_d[None, :]
    tl.store(p_out, (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_md)
