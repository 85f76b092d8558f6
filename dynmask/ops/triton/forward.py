# mypy: disable-error-code="no-untyped-def"
"""Forward pass over gathered keys: one list of keys per tile of query rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynmask.masks.triton.schedule import TILE, TileLists
from dynmask.ops.triton.common import (
    LOG2E,
    dot_precision,
    fit_rows,
    forward_tiles,
    int32_offsets,
    padded_dim,
)

_SHORT_TILE = 16


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    expiry: Tensor,
    lists: TileLists | None,
    scale: float,
    immortal: bool = False,
    tile: int = TILE,
    short: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend to the listed keys, or to whole prefixes without lists.

    Args:
        q: ``[B, H, Q, D]``, last stride 1, and so for k and v.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
        bias: ``[B, G, K]`` float32, contiguous along K, or None.
        expiry: ``[B, G, K]`` int32, contiguous along K.
        lists: Of this expiry and this Q, or None.
        scale: Factor of the logits.
        immortal: Whether no key ever expires, so that without lists few pairs need a test.
        tile: Query slots of the lists' tiles.
        short: Whether there are so few rows that smaller programs pay; only without lists.

    Returns:
        ``[B, H, Q, D]`` in q's dtype and the log-sum-exp ``[B, H, Q]`` float32, natural.
    """
    batch, heads, q_len, dim = q.shape
    groups, k_len = k.shape[1], k.shape[2]
    ratio = heads // groups
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    if short:
        tile = _SHORT_TILE
    t0 = (k_len - q_len) // tile
    tiles = triton.cdiv(k_len, tile) - t0
    shape = forward_tiles(q, short=short)
    if lists is not None:  # Without, tiles are large, or ``short`` has a shape of its own.
        shape = fit_rows(q, tile * ratio, shape)
    block_m, block_n, warps, stages = shape
    parts = triton.cdiv(tile * ratio, block_m)
    _forward_kernel[(tiles * parts, batch * groups)](
        q,
        k,
        v,
        bias,
        expiry,
        *((None, None, None) if lists is None else lists),
        out,
        lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        *((0, 0) if bias is None else bias.stride()[:2]),
        *expiry.stride()[:2],
        *((0, 0, 0) if lists is None else lists.keys.stride()[:3]),
        scale * LOG2E,
        groups,
        q_len,
        k_len,
        t0,
        tiles,
        R=ratio,
        D=dim,
        BLOCK_D=padded_dim(dim),
        HAS_BIAS=bias is not None,
        WIDE=not int32_offsets(k, v),
        PRECISION=dot_precision(q),
        LISTED=lists is not None,
        IMMORTAL=immortal,
        TILE=tile,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )
    return out, lse


@triton.jit
def _attend_block(
    b_q,
    b_acc,
    b_max,
    b_sum,
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
    """One online-softmax step over the keys ``o_j``; ``PARTIAL`` tests every pair."""
    o_row = o_j.to(tl.int64) if WIDE else o_j
    p_bk = p_k + o_row[:, None] * s_kn + o_d[None, :]
    p_bv = p_v + o_row[:, None] * s_vn + o_d[None, :]
    if PARTIAL:
        b_k = tl.load(p_bk, mask=m_j[:, None] & (o_d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        b_k = tl.load(p_bk)
    else:
        b_k = tl.load(p_bk, mask=(o_d < D)[None, :], other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
    if HAS_BIAS:
        b_bias = tl.load(p_bias + o_j, mask=m_j, other=0.0) if PARTIAL else tl.load(p_bias + o_j)
        b_s += (b_bias * 1.4426950408889634)[None, :]
    if PARTIAL:
        b_e = tl.load(p_expiry + o_j, mask=m_j, other=0)
        m_s = (o_j[None, :] <= o_slot[:, None]) & (o_slot[:, None] < b_e[None, :])
        b_s = tl.where(m_s & m_j[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # A row that has seen no key yet has the maximum -inf: subtract 0 there, or -inf - -inf is NaN.
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.math.exp2(b_s - b_safe[:, None])
    b_alpha = tl.math.exp2(b_max - b_safe)
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    b_acc = b_acc * b_alpha[:, None]
    if PARTIAL:
        b_v = tl.load(p_bv, mask=m_j[:, None] & (o_d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        b_v = tl.load(p_bv)
    else:
        b_v = tl.load(p_bv, mask=(o_d < D)[None, :], other=0.0)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_new, b_sum


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
def _forward_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_expiry,
    p_keys,
    p_full,
    p_partial,
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
    s_eb,
    s_eg,
    s_lb,
    s_lg,
    s_lt,
    scale_log2,
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
    parts = (TILE * R + BLOCK_M - 1) // BLOCK_M
    i_t = tl.program_id(0) // parts
    i_part = tl.program_id(0) % parts
    i_b = (tl.program_id(1) // G).to(tl.int64)
    i_g = (tl.program_id(1) % G).to(tl.int64)
    # The R query heads of the kv head are packed along the rows: row m is token m // R, head m % R.
    o_m = i_part * BLOCK_M + tl.arange(0, BLOCK_M)
    o_slot = (t0 + i_t) * TILE + o_m // R
    o_q = (o_slot - (K - Q)).to(tl.int64)
    o_h = i_g * R + o_m % R
    m_m = (o_m < TILE * R) & (o_q >= 0) & (o_q < Q)
    o_d = tl.arange(0, BLOCK_D)
    b_q = tl.load(
        p_q + i_b * s_qb + o_h[:, None] * s_qh + o_q[:, None] * s_qn + o_d[None, :],
        mask=m_m[:, None] & (o_d < D)[None, :],
        other=0.0,
    )
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
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    whole = n_full // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        o_j = start + tl.arange(0, BLOCK_N)
        if LISTED:
            o_j = tl.load(p_keys + o_j)
        b_acc, b_max, b_sum = _attend_block(
            b_q,
            b_acc,
            b_max,
            b_sum,
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
    # What is left of the full keys, then the partial ones from the list's end.
    jump = s_lt - total
    for start in range(whole, total, BLOCK_N):
        o_j = start + tl.arange(0, BLOCK_N)
        m_j = o_j < total
        if LISTED:
            o_j = tl.load(p_keys + o_j + tl.where(o_j < n_full, 0, jump), mask=m_j, other=0)
        b_acc, b_max, b_sum = _attend_block(
            b_q,
            b_acc,
            b_max,
            b_sum,
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
    empty = b_sum == 0
    b_out = b_acc / tl.where(empty, 1.0, b_sum)[:, None]
    b_lse = tl.where(empty, float("-inf"), (b_max + tl.math.log2(b_sum)) * 0.6931471805599453)
    tl.store(
        p_out + i_b * s_ob + o_h[:, None] * s_oh + o_q[:, None] * s_on + o_d[None, :],
        b_out.to(p_out.dtype.element_ty),
        mask=m_m[:, None] & (o_d < D)[None, :],
    )
    tl.store(p_lse + (i_b * G * R + o_h) * Q + o_q, b_lse, mask=m_m)
