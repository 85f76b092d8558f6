# mypy: disable-error-code="no-untyped-def"
"""A few query rows over a long cache: keys are split over programs, hidden ones are not read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dynmask.ops.triton.common import (
    LOG2E,
    dot_precision,
    int32_offsets,
    launches_early,
    padded_dim,
    processors,
)

# Packed rows (query rows times heads of a group) up to which this kernel runs instead of the
# gathering one: with few rows the time goes into reading keys.
MOST_ROWS = 64
_BLOCK = 128
# Bytes of a block of keys: several of them, and as many of values, fit shared memory.
_BLOCK_BYTES = 1 << 15
# Keys of a program, at least. Short caches are all latency: they get one small block a program.
# Where there are more than 32 programs of a head, adding up their parts costs more than it saves.
_LEAST_CHUNK = 64
_CHUNK = 256
_SPLITS = 32


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    expiry: Tensor,
    scale: float,
    immortal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend from ``Q (H / G) <= 64`` packed rows to all keys that they see.

    Needs no lists: every program reads the expiries of its share of the keys and loads only the
    keys and values that some row sees. Shares depend on shapes and the number of multiprocessors.

    Args:
        q: ``[B, H, Q, D]``, last stride 1, and so for k and v.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
        bias: ``[B, G, K]`` float32, contiguous along K, or None.
        expiry: ``[B, G, K]`` int32, contiguous along K.
        scale: Factor of the logits.
        immortal: Whether no key ever expires; then the expiries are not read.

    Returns:
        ``[B, H, Q, D]`` in q's dtype and the log-sum-exp ``[B, H, Q]`` float32, natural.
    """
    batch, heads, q_len, dim = q.shape
    groups, k_len = k.shape[1], k.shape[2]
    ratio = heads // groups
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    even = triton.cdiv(k_len * batch * groups, 8 * processors(q.device))
    chunk = max(_LEAST_CHUNK, even, min(_CHUNK, triton.cdiv(k_len, _SPLITS)))
    block_d = padded_dim(dim)
    block = max(16, min(_BLOCK, chunk, _BLOCK_BYTES // (block_d * q.element_size())))
    block = triton.next_power_of_2(block + 1) // 2  # Rounded down.
    chunk = triton.cdiv(chunk, block) * block
    splits = triton.cdiv(k_len, chunk)
    rows = q_len * ratio
    block_m = max(16, triton.next_power_of_2(rows))
    part = part_lse = None
    if splits > 1:
        part = torch.empty(
            batch * groups, splits, rows, block_d, dtype=torch.float32, device=q.device
        )
        part_lse = torch.empty(batch * groups, splits, rows, dtype=torch.float32, device=q.device)
    shape = {"R": ratio, "D": dim, "BLOCK_D": block_d, "BLOCK_M": block_m}
    early = launches_early(q.device)
    after = {"launch_pdl": True} if early else {}
    _decode_kernel[(splits, batch * groups)](
        q,
        k,
        v,
        bias,
        expiry,
        out,
        lse,
        part,
        part_lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        *((0, 0) if bias is None else bias.stride()[:2]),
        *expiry.stride()[:2],
        scale * LOG2E,
        groups,
        q_len,
        k_len,
        chunk,
        splits,
        HAS_BIAS=bias is not None,
        IMMORTAL=immortal,
        WIDE=not int32_offsets(k, v),
        SPLIT=splits > 1,
        PRECISION=dot_precision(q),
        EARLY=early,
        BLOCK_N=block,
        num_warps=4,
        num_stages=3,
        **shape,
        **after,
    )
    if splits > 1:
        combine_kernel[(rows, batch * groups)](
            part,
            part_lse,
            out,
            lse,
            *out.stride()[:3],
            groups,
            q_len,
            splits,
            R=ratio,
            D=dim,
            BLOCK_D=block_d,
            BLOCK_S=32,
            EARLY=early,
            num_warps=4,
            **after,
        )
    return out, lse


@triton.jit
def _decode_block(
    b_q,
    b_acc,
    b_max,
    b_sum,
    p_k,
    p_v,
    p_bias,
    o_j,
    b_e,
    o_slot,
    o_d,
    s_kn,
    s_vn,
    first_slot,
    scale_log2,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One online-softmax step; only keys and values that some row sees are read."""
    m_j = b_e > tl.maximum(o_j, first_slot)
    o_row = o_j.to(tl.int64) if WIDE else o_j
    m_jd = m_j[:, None] & (o_d < D)[None, :]
    b_k = tl.load(p_k + o_row[:, None] * s_kn + o_d[None, :], mask=m_jd, other=0.0)
    b_v = tl.load(p_v + o_row[:, None] * s_vn + o_d[None, :], mask=m_jd, other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
    if HAS_BIAS:
        b_bias = tl.load(p_bias + o_j, mask=m_j, other=0.0)
        b_s += (b_bias * 1.4426950408889634)[None, :]
    m_s = (o_j[None, :] <= o_slot[:, None]) & (o_slot[:, None] < b_e[None, :])
    b_s = tl.where(m_s & m_j[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.math.exp2(b_s - b_safe[:, None])
    b_alpha = tl.math.exp2(b_max - b_safe)
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    b_acc = b_acc * b_alpha[:, None]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_new, b_sum


@triton.jit(do_not_specialize=["s_bb", "s_bg", "s_eb", "s_eg", "G", "Q", "K", "chunk", "splits"])
def _decode_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_expiry,
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
    s_eb,
    s_eg,
    scale_log2,
    G,
    Q,
    K,
    chunk,
    splits,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IMMORTAL: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if EARLY:
        # Launched before the kernel ahead of it has ended, as the next one may be now.
        gdc_wait()
        gdc_launch_dependents()
    i_s = tl.program_id(0)
    i_bg = tl.program_id(1)
    i_b = (i_bg // G).to(tl.int64)
    i_g = (i_bg % G).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    o_q = o_m // R
    o_h = i_g * R + o_m % R
    m_m = o_q < Q
    o_slot = K - Q + o_q
    o_d = tl.arange(0, BLOCK_D)
    m_md = m_m[:, None] & (o_d < D)[None, :]
    p_bq = p_q + i_b * s_qb + (o_h * s_qh + o_q * s_qn)[:, None] + o_d[None, :]
    b_q = tl.load(p_bq, mask=m_md, other=0.0)
    p_k += i_b * s_kb + i_g * s_kg
    p_v += i_b * s_vb + i_g * s_vg
    p_expiry += i_b * s_eb + i_g * s_eg
    if HAS_BIAS:
        p_bias += i_b * s_bb + i_g * s_bg
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum((i_s + 1) * chunk, K)
    for start in range(i_s * chunk, end, BLOCK_N):
        o_j = start + tl.arange(0, BLOCK_N)
        if IMMORTAL:
            # No branch on what was read, so that Triton can load ahead.
            b_acc, b_max, b_sum = _decode_block(
                b_q,
                b_acc,
                b_max,
                b_sum,
                p_k,
                p_v,
                p_bias,
                o_j,
                tl.where(o_j < end, K, 0),
                o_slot,
                o_d,
                s_kn,
                s_vn,
                K - Q,
                scale_log2,
                D,
                HAS_BIAS,
                WIDE,
                PRECISION,
            )
        else:
            b_e = tl.load(p_expiry + o_j, mask=o_j < end, other=0)
            if tl.max((b_e > tl.maximum(o_j, K - Q)).to(tl.int32), 0) > 0:
                b_acc, b_max, b_sum = _decode_block(
                    b_q,
                    b_acc,
                    b_max,
                    b_sum,
                    p_k,
                    p_v,
                    p_bias,
                    o_j,
                    b_e,
                    o_slot,
                    o_d,
                    s_kn,
                    s_vn,
                    K - Q,
                    scale_log2,
                    D,
                    HAS_BIAS,
                    WIDE,
                    PRECISION,
                )
    empty = b_sum == 0
    b_acc = b_acc / tl.where(empty, 1.0, b_sum)[:, None]
    b_lse = tl.where(empty, float("-inf"), b_max + tl.math.log2(b_sum))
    if SPLIT:
        o_r = (i_bg.to(tl.int64) * splits + i_s) * (Q * R) + o_m
        tl.store(p_part + o_r[:, None] * BLOCK_D + o_d[None, :], b_acc, mask=m_m[:, None])
        tl.store(p_part_lse + o_r, b_lse, mask=m_m)
    else:
        p_o = p_out + i_b * s_ob + (o_h * s_oh + o_q * s_on)[:, None] + o_d[None, :]
        tl.store(p_o, b_acc.to(p_out.dtype.element_ty), mask=m_md)
        tl.store(p_lse + (i_b * G * R + o_h) * Q + o_q, b_lse * 0.6931471805599453, mask=m_m)


@triton.jit(do_not_specialize=["G", "Q", "splits"])
def combine_kernel(
    p_part,
    p_part_lse,
    p_out,
    p_lse,
    s_ob,
    s_oh,
    s_on,
    G,
    Q,
    splits,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr = False,
):
    """Weigh the partial outputs of one packed row by their sums of exponentials.

    With EARLY it is launched before the partial outputs are there, and waits for them.
    """
    if EARLY:
        gdc_wait()
    i_m = tl.program_id(0)
    i_bg = tl.program_id(1)
    i_b = (i_bg // G).to(tl.int64)
    i_h = (i_bg % G).to(tl.int64) * R + i_m % R
    i_q = i_m // R
    rows = Q * R
    o_d = tl.arange(0, BLOCK_D)
    base = i_bg.to(tl.int64) * splits * rows + i_m
    b_acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    b_max = float("-inf")
    b_sum = 0.0
    for start in range(0, splits, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        m_s = o_s < splits
        o_r = base + o_s * rows
        b_l = tl.load(p_part_lse + o_r, mask=m_s, other=float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_l, 0))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_w = tl.math.exp2(b_l - b_safe)
        b_o = tl.load(p_part + o_r[:, None] * BLOCK_D + o_d[None, :], mask=m_s[:, None], other=0.0)
        b_alpha = tl.math.exp2(b_max - b_safe)
        b_acc = b_acc * b_alpha + tl.sum(b_o * b_w[:, None], 0)
        b_sum = b_sum * b_alpha + tl.sum(b_w, 0)
        b_max = b_new
    empty = b_sum == 0
    b_acc = b_acc / tl.where(empty, 1.0, b_sum)
    b_lse = tl.where(empty, float("-inf"), (b_max + tl.math.log2(b_sum)) * 0.6931471805599453)
    p_o = p_out + i_b * s_ob + i_h * s_oh + i_q * s_on + o_d
    tl.store(p_o, b_acc.to(p_out.dtype.element_ty), mask=o_d < D)
    tl.store(p_lse + (i_b * G * R + i_h) * Q + i_q, b_lse)
