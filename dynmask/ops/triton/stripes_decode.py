# mypy: disable-error-code="no-untyped-def"
"""A few rows under stripes: every row reads its columns, and the keys at its offsets."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynmask.ops.triton.common import LOG2E, int32_offsets, padded_dim, processors
from dynmask.ops.triton.decode import combine_kernel
from dynmask.ops.triton.stripes_tables import StripeKeys

# Query rows up to which this kernel runs instead of the tiled one.
MOST_ROWS = 8
_BLOCK = 64
_CHUNK = 256


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    keys: StripeKeys,
    runs: Tensor | None,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend row by row; the keys of a row are split over programs.

    Args:
        q: ``[B, H, Q, D]``, last stride 1, and so for k and v.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
        bias: ``[B, G, K]`` float32, contiguous along K, or None.
        keys: The mask's.
        runs: ``[B, 2]`` int32, first and one past the last real key slot, or None for all.
        most: At least the number of columns and offsets of any head, ``K`` if one is full.
        scale: Factor of the logits.

    Returns:
        ``[B, H, Q, D]`` in q's dtype and the log-sum-exp ``[B, H, Q]`` float32, natural.
    """
    batch, heads, q_len, dim = q.shape
    groups, k_len = k.shape[1], k.shape[2]
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    chunk = max(_CHUNK, triton.cdiv(most * lse.numel(), 16 * processors(q.device)))
    chunk = triton.cdiv(chunk, _BLOCK) * _BLOCK
    splits = triton.cdiv(most, chunk)
    block_d = padded_dim(dim)
    part = part_lse = None
    if splits > 1:
        part = lse.new_empty(batch * heads, splits, q_len, block_d)
        part_lse = lse.new_empty(batch * heads, splits, q_len)
    _stripes_decode_kernel[(splits, q_len, batch * heads)](
        q,
        k,
        v,
        bias,
        keys.is_column,
        keys.columns,
        keys.column_runs,
        keys.offsets,
        keys.offset_runs,
        runs,
        out,
        lse,
        part,
        part_lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        *((0, 0) if bias is None else bias.stride()[:2]),
        scale * LOG2E,
        heads,
        heads // groups,
        q_len,
        k_len,
        keys.is_column.shape[1],
        chunk,
        splits,
        D=dim,
        BLOCK_D=block_d,
        HAS_BIAS=bias is not None,
        PADDED=runs is not None,
        WIDE=not int32_offsets(k, v),
        SPLIT=splits > 1,
        BLOCK_N=_BLOCK,
        num_warps=4,
        num_stages=2,
    )
    if splits > 1:
        combine_kernel[(q_len, batch * heads)](
            part,
            part_lse,
            out,
            lse,
            *out.stride()[:3],
            heads,
            q_len,
            splits,
            R=1,
            D=dim,
            BLOCK_D=block_d,
            BLOCK_S=32,
            num_warps=4,
        )
    return out, lse


@triton.jit
def _stripes_decode_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_is_column,
    p_columns,
    p_column_runs,
    p_offsets,
    p_offset_runs,
    p_runs,
    p_out,
    p_lse,
    p_part,
    p_part_lse,
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
    H,
    R,
    Q,
    K,
    S,
    chunk,
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_s = tl.program_id(0)
    i_q = tl.program_id(1)
    i_bh = tl.program_id(2).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    i_g = i_h // R
    begin = 0
    length = K
    if PADDED:
        begin = tl.load(p_runs + 2 * i_b)
        length = tl.load(p_runs + 2 * i_b + 1) - begin
    i = K - Q + i_q - begin
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_q = tl.load(p_q + i_b * s_qb + i_h * s_qh + i_q * s_qn + o_d, mask=m_d, other=0.0)
    b_q = b_q.to(tl.float32) * scale_log2
    p_k += i_b * s_kb + i_g * s_kg
    p_v += i_b * s_vb + i_g * s_vg
    if HAS_BIAS:
        p_bias += i_b * s_bb + i_g * s_bg
    p_is_column += i_h * S
    p_columns += tl.load(p_column_runs + 2 * i_h)
    p_offsets += tl.load(p_offset_runs + 2 * i_h)
    n_columns = tl.load(p_column_runs + 2 * i_h + 1)
    total = n_columns + tl.load(p_offset_runs + 2 * i_h + 1)
    b_acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    b_max = tl.full([1], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([1], dtype=tl.float32)
    # A row of padding sees nothing.
    total = tl.where((i >= 0) & (i < length), total, 0)
    end = tl.minimum((i_s + 1) * chunk, total)
    for start in range(i_s * chunk, end, BLOCK_N):
        o = start + tl.arange(0, BLOCK_N)
        listed = o < n_columns
        o_c = tl.load(p_columns + o, mask=listed, other=0)
        o_r = tl.load(p_offsets + o - n_columns, mask=(listed == 0) & (o < end), other=0)
        o_j = tl.where(listed, o_c, i - o_r)
        m_j = (o < end) & (o_j >= 0) & (o_j <= i)
        # A key that is a column already is not read again at its offset.
        again = tl.load(p_is_column + o_j, mask=m_j & (listed == 0), other=0) != 0
        m_j = m_j & (again == 0)
        if tl.max(m_j.to(tl.int32), 0) > 0:
            o_j += begin
            o_row = o_j.to(tl.int64) if WIDE else o_j
            m_jd = m_j[:, None] & m_d[None, :]
            b_k = tl.load(p_k + o_row[:, None] * s_kn + o_d[None, :], mask=m_jd, other=0.0)
            b_v = tl.load(p_v + o_row[:, None] * s_vn + o_d[None, :], mask=m_jd, other=0.0)
            b_s = tl.sum(b_k.to(tl.float32) * b_q[None, :], 1)
            if HAS_BIAS:
                b_s += tl.load(p_bias + o_j, mask=m_j, other=0.0) * 1.4426950408889634
            b_s = tl.where(m_j, b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 0))
            b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_p = tl.math.exp2(b_s - b_safe)
            b_alpha = tl.math.exp2(b_max - b_safe)
            b_sum = b_sum * b_alpha + tl.sum(b_p, 0)
            b_acc = b_acc * b_alpha + tl.sum(b_p[:, None] * b_v.to(tl.float32), 0)
            b_max = b_new
    empty = b_sum == 0
    b_acc = b_acc / tl.where(empty, 1.0, b_sum)
    b_lse = tl.where(empty, float("-inf"), b_max + tl.math.log2(b_sum))
    one = tl.arange(0, 1)
    if SPLIT:
        o_r = (i_bh * splits + i_s) * Q + i_q
        tl.store(p_part + o_r * BLOCK_D + o_d, b_acc)
        tl.store(p_part_lse + o_r + one, b_lse)
    else:
        p_o = p_out + i_b * s_ob + i_h * s_oh + i_q * s_on + o_d
        tl.store(p_o, b_acc.to(p_out.dtype.element_ty), mask=m_d)
        tl.store(p_lse + i_bh * Q + i_q + one, b_lse * 0.6931471805599453)
