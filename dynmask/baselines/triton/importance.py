# mypy: disable-error-code="no-untyped-def"
"""How much attention native sparse attention's blocks get, on the GPU, in two kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynmask.masks.triton.library import fake, operator
from dynmask.ops.triton.common import LOG2E, dot_precision, padded_dim


@operator("block_importance")
def block_importance(
    q: Tensor, keys: Tensor, k_len: int, block: int, stride: int, select_block: int
) -> Tensor:
    """Return `dynmask.baselines.nsa_compress.importance`, where the formula is.

    One kernel finds the total of each row's softmax, another walks over the blocks: no probability
    reaches memory.

    Args:
        q: ``[B, H, Q, D]``, the last rows.
        keys: ``[B, G, 1 + K // stride, D]``.
        k_len: Tokens ``K``.
        block: Tokens of a compressed block, a multiple of the stride.
        stride: Tokens between two of them.
        select_block: Tokens of a block that can be selected, a multiple of the stride.

    Returns:
        ``[B, G, Q, blocks]`` float32.
    """
    q, keys = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, keys))
    batch, heads, q_len, dim = q.shape
    groups, blocks = keys.shape[1], triton.cdiv(k_len, select_block)
    made = q.new_empty(batch, groups, q_len, blocks, dtype=torch.float32)
    total = q.new_empty(batch, heads, q_len, dtype=torch.float32)
    # Tiles of 16 KiB fit the shared memory that any GPU since 2018 but Turing has.
    rows = max(16, min(64, 2**14 // (padded_dim(dim) * q.element_size())))
    constants = {
        "STRIDE": stride,
        "D": dim,
        "BLOCK_D": padded_dim(dim),
        "BLOCK_M": rows,
        "PRECISION": dot_precision(q),
    }
    given = (*q.stride()[:3], *keys.stride()[:3], dim**-0.5 * LOG2E, heads, heads // groups)
    programs = triton.cdiv(q_len, rows)
    # Blocks of a program: no more than there are, but what a matrix product takes.
    wide = min(rows, max(16, triton.next_power_of_2(blocks)))
    with torch.cuda.device_of(q):
        importance_total_kernel[(programs, batch * heads)](
            q, keys, total, *given, q_len, k_len, **constants, BLOCK_N=rows, num_stages=2
        )
        importance_kernel[(programs, triton.cdiv(blocks, wide), batch * groups)](
            q,
            keys,
            total,
            made,
            *given,
            q_len,
            k_len,
            blocks,
            **constants,
            BLOCK_N=wide,
            OVERLAP=block // stride,
            STRIDES=select_block // stride,
            num_stages=2,
        )
    return made


@fake("block_importance")
def _(q: Tensor, keys: Tensor, k_len: int, block: int, stride: int, select_block: int) -> Tensor:
    blocks = -(-k_len // select_block)
    return q.new_empty(q.shape[0], keys.shape[1], q.shape[2], blocks, dtype=torch.float32)


@triton.jit
def _rows(p_q, s_qn, row, Q, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows of one head."""
    o_d = tl.arange(0, BLOCK_D)
    p_q += row[:, None].to(tl.int64) * s_qn + o_d[None, :]
    return tl.load(p_q, mask=(row < Q)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["Q", "K"])
def importance_total_kernel(
    p_q,
    p_k,
    p_total,
    s_qb,
    s_qh,
    s_qn,
    s_kb,
    s_kg,
    s_kn,
    scale_log2,
    H,
    R,
    Q,
    K,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add up the weights of one head's rows, in powers of two."""
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = tl.program_id(1) % H
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_q = _rows(p_q + i_b * s_qb + i_h * s_qh, s_qn, o_m, Q, D, BLOCK_D)
    # A row sees the learned vector and what ends before it.
    b_seen = (K - Q + tl.minimum(o_m, Q - 1)) // STRIDE + 1
    most = tl.max(b_seen, 0)
    o_d = tl.arange(0, BLOCK_D)
    p_k += i_b * s_kb + (i_h // R) * s_kg + o_d[None, :]
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(0, most, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_k = (o_n < most)[:, None] & (o_d < D)[None, :]
        b_k = tl.load(p_k + o_n[:, None].to(tl.int64) * s_kn, mask=m_k, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
        b_s = tl.where(o_n[None, :] < b_seen[:, None], b_s, float("-inf"))
        # All rows see the first column.
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_sum = b_sum * tl.math.exp2(b_max - b_new)
        b_sum += tl.sum(tl.math.exp2(b_s - b_new[:, None]), 1)
        b_max = b_new
    p_total += (i_b * H + i_h) * Q + o_m
    tl.store(p_total, b_max + tl.math.log2(b_sum), mask=o_m < Q)


@triton.jit(do_not_specialize=["Q", "K", "N"])
def importance_kernel(
    p_q,
    p_k,
    p_total,
    p_made,
    s_qb,
    s_qh,
    s_qn,
    s_kb,
    s_kg,
    s_kn,
    scale_log2,
    H,
    R,
    Q,
    K,
    N,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
    STRIDES: tl.constexpr,
):
    """Add up what a few rows pay to a few blocks, over the query heads of one kv head."""
    G = H // R
    i_b = (tl.program_id(2) // G).to(tl.int64)
    i_g = tl.program_id(2) % G
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    b_seen = (K - Q + tl.minimum(o_m, Q - 1)) // STRIDE + 1
    most = tl.max(b_seen, 0)
    b_made = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    p_bk = p_k + i_b * s_kb + i_g * s_kg + o_d[None, :]
    # Slot 0 is the learned vector.
    if tl.program_id(1) * BLOCK_N * STRIDES + 1 < most:
        for r in range(0, R):
            i_h = i_g * R + r
            b_q = _rows(p_q + i_b * s_qb + i_h * s_qh, s_qn, o_m, Q, D, BLOCK_D)
            b_total = tl.load(p_total + (i_b * H + i_h) * Q + o_m, mask=o_m < Q, other=0.0)
            # Compressed blocks that overlap a block, each as often as they share a stride.
            for at in tl.static_range(0, STRIDES + OVERLAP - 1):
                o_c = o_n * STRIDES + at + 1
                m_k = (o_c < most)[:, None] & (o_d < D)[None, :]
                b_k = tl.load(p_bk + o_c[:, None].to(tl.int64) * s_kn, mask=m_k, other=0.0)
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
                # What is hidden may be far above the total.
                b_s = tl.where(o_c[None, :] < b_seen[:, None], b_s, float("-inf"))
                b_p = tl.math.exp2(b_s - b_total[:, None])
                b_made += b_p * (min(at, STRIDES - 1) - max(at - OVERLAP + 1, 0) + 1)
    p_made += ((i_b * G + i_g) * Q + o_m[:, None]) * N + o_n[None, :]
    tl.store(p_made, b_made, mask=(o_m < Q)[:, None] & (o_n < N)[None, :])
