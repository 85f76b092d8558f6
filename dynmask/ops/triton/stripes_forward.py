# mypy: disable-error-code="no-untyped-def"
"""Forward pass under stripes: columns are gathered, runs of offsets are read block by block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynmask.ops.triton.common import LOG2E, dot_precision, int32_offsets, padded_dim
from dynmask.ops.triton.stripes_tables import StripeKeys, TileTables


def tiles(q: Tensor) -> tuple[int, int, int, int]:
    """Return rows, keys, warps and pipeline stages of a program."""
    dim = padded_dim(q.shape[-1])
    if q.dtype == torch.float32:
        return (64, 32, 8, 2) if dim <= 128 else (32, 16, 8, 2)
    if dim <= 64:
        return 128, 64, 4, 3
    return 128, 64, 8, 3 if dim <= 128 else 2


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    keys: StripeKeys,
    tables: TileTables,
    corner: Tensor | None,
    runs: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    first: int,
    last: int,
) -> None:
    """Write the rows of tiles ``first`` to ``last - 1``, counted from each sequence's first token.

    Args:
        q: ``[B, H, Q, D]``, last stride 1, and so for k, v and out.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
        bias: ``[B, G, K]`` float32, contiguous along K, or None.
        keys: The mask's.
        tables: The mask's, for `tiles`.
        corner: ``[H, L, L]`` bool, contiguous: what the rows before ``L`` see, if these tiles hold
            such; every key up to a tile's end is read then.
        runs: ``[B, 2]`` int32, first and one past the last real key slot, or None for all.
        out: ``[B, H, Q, D]``; padding rows are not written.
        lse: ``[B, H, Q]`` float32, natural; as out.
        scale: Factor of the logits.
        first: First tile.
        last: One past the last tile.
    """
    batch, heads, q_len, dim = q.shape
    groups, k_len = k.shape[1], k.shape[2]
    tile, block, warps, stages = tiles(q)
    _stripes_kernel[(last - first, heads, batch)](
        q,
        k,
        v,
        bias,
        keys.is_column,
        keys.columns,
        keys.column_runs,
        *tables,
        corner,
        runs,
        out,
        lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        *((0, 0) if bias is None else bias.stride()[:2]),
        scale * LOG2E,
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
def _step(
    b_q,
    b_acc,
    b_max,
    b_sum,
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
    """One online-softmax step over the keys ``o_j``; with MASKED, of the pairs ``m_s``."""
    o_row = o_j.to(tl.int64) if WIDE else o_j
    p_bk = p_k + o_row[:, None] * s_kn + o_d[None, :]
    p_bv = p_v + o_row[:, None] * s_vn + o_d[None, :]
    b_k = tl.load(p_bk) if D == BLOCK_D else tl.load(p_bk, mask=(o_d < D)[None, :], other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
    if HAS_BIAS:
        b_s += (tl.load(p_bias + o_j) * 1.4426950408889634)[None, :]
    if MASKED:
        b_s = tl.where(m_s, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # A row that has seen no key yet has the maximum -inf: subtract 0 there, or -inf - -inf is NaN.
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.math.exp2(b_s - b_safe[:, None])
    b_alpha = tl.math.exp2(b_max - b_safe)
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    b_acc = b_acc * b_alpha[:, None]
    b_v = tl.load(p_bv) if D == BLOCK_D else tl.load(p_bv, mask=(o_d < D)[None, :], other=0.0)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_new, b_sum


@triton.jit
def _stripes_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_is_column,
    p_columns,
    p_column_runs,
    p_near,
    p_before,
    p_blocks,
    p_reached,
    p_corner,
    p_runs,
    p_out,
    p_lse,
    s_qb,
    s_qh,
    s_qn,
    s_kb,
    s_kg,
    s_kn,
    s_vb,
    s_vg,
    s_vn,
    s_ob,
    s_oh,
    s_on,
    s_bb,
    s_bg,
    scale_log2,
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
    # The longest tiles begin first.
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
    p_q += i_b * s_qb + i_h * s_qh
    b_q = tl.load(p_q + o_q[:, None] * s_qn + o_d[None, :], mask=m_md, other=0.0)
    p_k += i_b * s_kb + i_g * s_kg
    p_v += i_b * s_vb + i_g * s_vg
    if PADDED:
        o_begin = tl.cast(begin, tl.int64)
        p_k += o_begin * s_kn
        p_v += o_begin * s_vn
    if HAS_BIAS:
        p_bias += i_b * s_bb + i_g * s_bg + begin
    p_is_column += i_h * S
    # Read at -r for the offset r, at 1 and on for keys in the row's future.
    p_near += i_h * (2 * S - 1) + S - 1
    b_acc = tl.zeros([TILE, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([TILE], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([TILE], dtype=tl.float32)
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
        # Columns before the tile: every row sees them.
        for start in range(0, whole, BLOCK_N):
            o_j = tl.load(p_columns + start + o_n)
            b_acc, b_max, b_sum = _step(
                b_q,
                b_acc,
                b_max,
                b_sum,
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
        # What is left of them, as block -1, and the blocks that every row sees, less the columns:
        # these blocks end before the tile.
        for n in range(tl.where(whole < n_columns, -1, 0), n_full):
            m = tl.load(p_full + n, mask=n >= 0, other=0)
            o_c = whole + o_n
            left = tl.load(p_columns + o_c, mask=(n < 0) & (o_c < n_columns), other=-1)
            o_k = tl.where(n < 0, left, a + TILE - (m + 1) * BLOCK_N + o_n)
            o_j = tl.maximum(o_k, 0)
            is_column = tl.load(p_is_column + o_j) != 0
            m_j = (o_k >= 0) & ((n < 0) | (is_column == 0))
            b_acc, b_max, b_sum = _step(
                b_q,
                b_acc,
                b_max,
                b_sum,
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
    # Blocks that some rows see, the tile's own keys and so their columns among them.
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
        b_acc, b_max, b_sum = _step(
            b_q,
            b_acc,
            b_max,
            b_sum,
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
    # A row of a sequence sees itself at least, unless a bias of -inf hides its keys.
    empty = b_sum == 0
    b_out = b_acc / tl.where(empty, 1.0, b_sum)[:, None]
    b_lse = tl.where(empty, float("-inf"), (b_max + tl.math.log2(b_sum)) * 0.6931471805599453)
    p_out += i_b * s_ob + i_h * s_oh
    p_bo = p_out + o_q[:, None] * s_on + o_d[None, :]
    tl.store(p_bo, b_out.to(p_out.dtype.element_ty), mask=m_md)
    tl.store(p_lse + (i_b * tl.num_programs(1) + i_h) * Q + o_q, b_lse, mask=m_m)
