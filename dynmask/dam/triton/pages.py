# mypy: disable-error-code="no-untyped-def"
"""What decode steps find in blocks of 4-bit keys, on the GPU: each block is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynmask.dam.paged_costs import PageStats
from dynmask.dam.quantized import Quantized

# Blocks of a program: enough programs for a GPU at 8K tokens, few enough not to drown at 1M.
_PAGES = 8


def quantized_stats(
    q: Tensor, codes: Quantized, means: Tensor, *, count: int, scale: float
) -> PageStats:
    """Return the statistics of the first blocks, from the keys that their codes stand for.

    As `dynmask.dam.paged_costs.page_stats`; products in TF32, sums in float32.

    Args:
        q: ``[B, G, R, D]``, the rows of a kv head, at most 64; ``D`` even.
        codes: Of at least ``count`` blocks, contiguous.
        means: ``[B, G, count, D]``, the mean keys; last stride 1.
        count: How many blocks.
        scale: Factor of the logits.
    """
    batch, groups, rows, dim = q.shape
    block = codes.codes.shape[3]
    found = torch.empty(4, batch, groups, rows, count, dtype=torch.float32, device=q.device)
    if found.numel():
        with torch.cuda.device_of(q):
            _stats_kernel[(triton.cdiv(count, _PAGES), groups, batch)](
                q.contiguous(),
                codes.codes,
                codes.low,
                codes.step,
                means,
                found,
                *means.stride()[:3],
                codes.codes.shape[2],
                count,
                scale,
                found.stride(0),
                R=rows,
                BLOCK=block,
                D=dim,
                BLOCK_R=max(16, triton.next_power_of_2(rows)),
                BLOCK_J=max(16, triton.next_power_of_2(block)),
                BLOCK_H=max(16, triton.next_power_of_2(dim // 2)),
                PAGES=_PAGES,
            )
    return PageStats(*found)


@triton.jit(do_not_specialize=["room", "count", "s_part"])
def _stats_kernel(
    p_q,
    p_codes,
    p_low,
    p_step,
    p_means,
    p_found,
    s_b,
    s_g,
    s_n,
    room,
    count,
    scale,
    s_part,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PAGES: tl.constexpr,
):
    """Go over some blocks of one kv head; channels in two halves, as their codes share bytes."""
    i_g = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_bg = i_b * tl.num_programs(1) + i_g
    HALF: tl.constexpr = D // 2
    o_r = tl.arange(0, BLOCK_R)
    o_j = tl.arange(0, BLOCK_J)
    o_h = tl.arange(0, BLOCK_H)
    m_h = o_h < HALF
    m_r = o_r < R
    m_q = m_r[:, None] & m_h[None, :]
    p_q += i_bg * R * D + o_r[:, None] * D + o_h[None, :]
    b_first = tl.load(p_q, mask=m_q, other=0.0).to(tl.float32) * scale
    b_second = tl.load(p_q + HALF, mask=m_q, other=0.0).to(tl.float32) * scale
    p_means += i_b * s_b + i_g * s_g
    p_found += (i_bg * R + o_r) * count
    begin = tl.program_id(0).to(tl.int64) * PAGES
    for i_n in range(begin, tl.minimum(begin + PAGES, count)):
        i_page = i_bg * room + i_n
        p_n = i_page * D + o_h
        b_low = tl.load(p_low + p_n, mask=m_h, other=0.0)
        b_low2 = tl.load(p_low + p_n + HALF, mask=m_h, other=0.0)
        b_step = tl.load(p_step + p_n, mask=m_h, other=0.0)
        b_step2 = tl.load(p_step + p_n + HALF, mask=m_h, other=0.0)
        p_c = p_codes + i_page * (BLOCK * HALF) + o_j[:, None] * HALF + o_h[None, :]
        b_c = tl.load(p_c, mask=(o_j < BLOCK)[:, None] & m_h[None, :], other=0)
        base = tl.sum(b_first * b_low[None, :] + b_second * b_low2[None, :], 1)
        b_l = tl.dot(b_first * b_step[None, :], tl.trans((b_c & 15).to(tl.float32)))
        b_l += tl.dot(b_second * b_step2[None, :], tl.trans((b_c >> 4).to(tl.float32)))
        b_l = tl.where((o_j < BLOCK)[None, :], b_l + base[:, None], float("-inf"))
        top = tl.max(b_l, 1)
        b_e = tl.exp(b_l - top[:, None])
        p_mean = p_means + i_n * s_n + o_h
        b_mean = tl.load(p_mean, mask=m_h, other=0.0).to(tl.float32)
        b_mean2 = tl.load(p_mean + HALF, mask=m_h, other=0.0).to(tl.float32)
        summary = tl.sum(b_first * b_mean[None, :] + b_second * b_mean2[None, :], 1)
        tl.store(p_found + i_n, top, mask=m_r)
        tl.store(p_found + s_part + i_n, tl.sum(b_e, 1), mask=m_r)
        tl.store(p_found + 2 * s_part + i_n, tl.sum(b_e * b_e, 1), mask=m_r)
        tl.store(p_found + 3 * s_part + i_n, summary, mask=m_r)
