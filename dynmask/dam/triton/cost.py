# mypy: disable-error-code="no-untyped-def"
"""What a block's summary would cost a tile of query rows, on the GPU, in two kernels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynmask.dam.dynamic_cost import FIRST
from dynmask.ops.triton.common import LOG2E, dot_precision, padded_dim

if TYPE_CHECKING:
    from dynmask.dam.dynamic_keys import Keys

# Blocks that one program costs at most: with more, short prompts would make few programs.
_CHUNK = 32


def block_costs(
    rows: Tensor,
    places: Tensor,
    keys: Keys,
    far: Tensor,
    *,
    count: int,
    first: int,
    last: int,
    tile: int,
    every: int,
    scale: float,
) -> Tensor:
    """Return the mean cost of each block's summary to each tile's rows.

    As `dynmask.dam.dynamic_cost.block_costs`, where the formula is. One kernel finds each
    representative's softmax total, another walks over the landmarks once.

    Args:
        rows: ``[B, G, T, S, D]``, the tiles' representatives, each row of ``D`` contiguous.
        places: ``[B, G, T, S - 1]`` int64, contiguous: where all but the last stand in their tiles,
            modulo ``tile``; the last stands at its tile's end.
        keys: Of the whole sequence; a power of two of landmarks a block.
        far: ``[T]``, how many blocks are far from each tile, the first ones.
        count: The largest of ``far``.
        first: Position of the first row.
        last: Position behind the last row; keys from here on do not count.
        tile: Rows of a tile of one head.
        every: Rows of a tile; the last representative stands for ``every - S + 1``.
        scale: Factor of the logits.

    Returns:
        ``[B, G, T, count]`` float32, finite; what is not far is not written. Weights far above 1,
        from logits beyond the softmax's estimated total, count as less than they are: their blocks
        cost more than is ever left.
    """
    batch, groups, tiles, some, dim = rows.shape
    marks = keys.landmarks.shape[2]
    few = min(FIRST, marks - 1)
    cost = torch.empty(batch, groups, tiles, count, dtype=torch.float32, device=rows.device)
    total = torch.empty(batch, groups, tiles, some, dtype=torch.float32, device=rows.device)
    padded = triton.next_power_of_2(some)
    size = _sizes(rows)
    of_tiles = max(1, size.rows // padded, 16 // padded)
    constants = {
        "S": some,
        "D": dim,
        "BLOCK_D": padded_dim(dim),
        "TILES": of_tiles,
        "ROWS": padded,
        "PRECISION": dot_precision(rows),
        "num_warps": 8 if of_tiles * padded >= 128 else 4,
    }
    programs = triton.cdiv(tiles, of_tiles)
    strides = rows.stride()[:4]
    with torch.cuda.device_of(rows):
        _total_kernel[(programs, batch * groups)](
            rows,
            places,
            far,
            keys.k,
            keys.landmarks,
            total,
            *strides,
            *keys.k.stride()[:3],
            *keys.landmarks.stride()[:4],
            scale * LOG2E,
            math.log2(keys.block - few),
            groups,
            tiles,
            keys.summaries,
            first,
            last,
            tile,
            keys.block,
            **constants,
            FEW=few,
            MARKS=max(triton.next_power_of_2(few), 1),
            BLOCK_N=size.far,
            NEAR_N=size.near,
            num_stages=min(size.stages, 2),
        )
        _cost_kernel[(programs, triton.cdiv(count, _CHUNK), batch * groups)](
            rows,
            far,
            keys.k,
            keys.landmarks,
            total,
            cost,
            *strides,
            *keys.k.stride()[:3],
            *keys.landmarks.stride()[:4],
            scale * LOG2E,
            groups,
            tiles,
            count,
            keys.block,
            every,
            **constants,
            MARKS=marks,
            SOME=min(size.marks, marks),
            BLOCK_N=size.blocks,
            CHUNK=_CHUNK,
            num_stages=size.stages,
        )
    return cost


class _Sizes(NamedTuple):
    """What a program holds at once.

    Attributes:
        rows: Representatives.
        blocks: Blocks that are costed.
        marks: Landmarks of each that are costed.
        far: Blocks that are added up, `FIRST` landmarks of each.
        near: Near keys.
        stages: Of the pipeline.
    """

    rows: int
    blocks: int
    marks: int
    far: int
    near: int
    stages: int


def _sizes(rows: Tensor) -> _Sizes:
    """Fit the registers, and the 99 KiB of shared memory that any GPU since 2018 but Turing has."""
    dim = padded_dim(rows.shape[-1])
    if rows.dtype == torch.float32:
        return _Sizes(32, 16, 2, 16, 32, 2) if dim <= 128 else _Sizes(16, 16, 1, 16, 16, 1)
    if dim <= 64:
        return _Sizes(64, 32, 1, 32, 64, 3)
    if dim <= 128:
        return _Sizes(64, 32, 2, 32, 32, 2)
    return _Sizes(64, 16, 2, 16, 16, 2)


@triton.jit(do_not_specialize=["T", "summaries", "first", "last"])
def _total_kernel(
    p_q,
    p_places,
    p_far,
    p_k,
    p_marks,
    p_total,
    s_qb,
    s_qg,
    s_qt,
    s_qs,
    s_kb,
    s_kg,
    s_kn,
    s_lb,
    s_lg,
    s_lm,
    s_ln,
    scale_log2,
    log2_others,
    G,
    T,
    summaries,
    first,
    last,
    tile,
    block,
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    FEW: tl.constexpr,
    MARKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NEAR_N: tl.constexpr,
):
    """Add up the weights of a few tiles' representatives, in powers of two: far, then near."""
    i_bg = tl.program_id(1).to(tl.int64)
    o_m = tl.arange(0, TILES * ROWS)
    o_t = tl.program_id(0) * TILES + o_m // ROWS
    o_s = o_m % ROWS
    m_m = (o_t < T) & (o_s < S)
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    p_bq = p_q + (i_bg // G) * s_qb + (i_bg % G) * s_qg + o_t.to(tl.int64) * s_qt + o_s * s_qs
    b_q = tl.load(p_bq[:, None] + o_d[None, :], mask=m_m[:, None] & m_d, other=0.0)
    b_far = tl.load(p_far + o_t, mask=o_t < T, other=0).to(tl.int32)
    p_places += (i_bg * T + o_t) * (S - 1) + o_s
    b_place = tl.load(p_places, mask=m_m & (o_s < S - 1), other=tile - 1).to(tl.int32)
    b_at = (first // tile + o_t) * tile + b_place % tile
    # A copy stands where its original does.
    b_at = tl.where(m_m, tl.minimum(tl.maximum(b_at, first), last - 1), -1)
    p_k += (i_bg // G) * s_kb + (i_bg % G) * s_kg
    b_max = tl.full([TILES * ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([TILES * ROWS], dtype=tl.float32)
    p_marks += (i_bg // G) * s_lb + (i_bg % G) * s_lg
    far = tl.max(b_far, 0)
    # A column is one landmark of one block.
    o_c = tl.arange(0, MARKS * BLOCK_N)
    o_l = o_c // BLOCK_N
    o_b = tl.arange(0, BLOCK_N)
    for start in range(0, far, BLOCK_N):
        o_n = start + o_b
        p_bk = p_k + o_n[:, None].to(tl.int64) * s_kn + o_d[None, :]
        b_k = tl.load(p_bk, mask=(o_n < far)[:, None] & m_d, other=0.0)
        b_mean = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale_log2 * block)
        o_n = start + o_c % BLOCK_N
        m_c = (o_n < far) & (o_l < FEW)
        p_bk = p_marks + (o_l * s_lm + o_n.to(tl.int64) * s_ln)[:, None] + o_d[None, :]
        b_k = tl.load(p_bk, mask=m_c[:, None] & m_d, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
        b_others = b_mean - tl.sum(tl.reshape(b_s, [b_s.shape[0], MARKS, BLOCK_N]), 1)
        b_others = b_others / (block - FEW) + log2_others
        m_s = (start + o_b)[None, :] < b_far[:, None]
        b_others = tl.where(m_s, b_others, float("-inf"))
        m_s = (o_n[None, :] < b_far[:, None]) & (o_l < FEW)[None, :]
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.maximum(tl.max(b_s, 1), tl.max(b_others, 1)))
        # -inf - -inf would be NaN.
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.math.exp2(b_max - b_safe)
        b_sum += tl.sum(tl.math.exp2(b_s - b_safe[:, None]), 1)
        b_sum += tl.sum(tl.math.exp2(b_others - b_safe[:, None]), 1)
        b_max = b_new
    p_k += summaries.to(tl.int64) * s_kn
    b_near = b_far * block
    high = tl.minimum(tl.max(b_at, 0) + 1, last)
    for start in range(tl.min(tl.where(m_m, b_near, last), 0), high, NEAR_N):
        o_n = start + tl.arange(0, NEAR_N)
        p_bk = p_k + o_n[:, None].to(tl.int64) * s_kn + o_d[None, :]
        b_k = tl.load(p_bk, mask=(o_n < high)[:, None] & m_d, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
        m_s = (o_n[None, :] >= b_near[:, None]) & (o_n[None, :] <= b_at[:, None])
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.math.exp2(b_max - b_safe)
        b_sum += tl.sum(tl.math.exp2(b_s - b_safe[:, None]), 1)
        b_max = b_new
    tl.store(p_total + (i_bg * T + o_t) * S + o_s, b_max + tl.math.log2(b_sum), mask=m_m)


@triton.jit(do_not_specialize=["T", "N"])
def _cost_kernel(
    p_q,
    p_far,
    p_k,
    p_marks,
    p_total,
    p_cost,
    s_qb,
    s_qg,
    s_qt,
    s_qs,
    s_kb,
    s_kg,
    s_kn,
    s_lb,
    s_lg,
    s_lm,
    s_ln,
    scale_log2,
    G,
    T,
    N,
    block,
    every,
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    MARKS: tl.constexpr,
    SOME: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Cost one chunk of blocks for a few tiles, landmark by landmark."""
    i_bg = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * CHUNK
    o_m = tl.arange(0, TILES * ROWS)
    o_t = tl.program_id(0) * TILES + o_m // ROWS
    o_s = o_m % ROWS
    m_m = (o_t < T) & (o_s < S)
    o_i = tl.program_id(0) * TILES + tl.arange(0, TILES)
    b_far = tl.load(p_far + o_i, mask=o_i < T, other=0).to(tl.int32)
    end = tl.minimum(tl.max(b_far, 0), first + CHUNK)
    if first >= end:
        return
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    p_bq = p_q + (i_bg // G) * s_qb + (i_bg % G) * s_qg + o_t.to(tl.int64) * s_qt + o_s * s_qs
    b_q = tl.load(p_bq[:, None] + o_d[None, :], mask=m_m[:, None] & m_d, other=0.0)
    b_total = tl.load(p_total + (i_bg * T + o_t) * S + o_s, mask=m_m, other=0.0)
    # The last representative stands for the rest, and so does the last landmark, below.
    b_rows = tl.where(m_m, tl.where(o_s == S - 1, every - S + 1, 1), 0).to(tl.float32) / every
    p_k += (i_bg // G) * s_kb + (i_bg % G) * s_kg + o_d[None, :]
    p_marks += (i_bg // G) * s_lb + (i_bg % G) * s_lg + o_d[None, :]
    p_cost += (i_bg * T + o_i) * N
    # A column is one landmark of one block.
    o_c = tl.arange(0, SOME * BLOCK_N)
    o_b = tl.arange(0, BLOCK_N)
    for start in range(first, end, BLOCK_N):
        o_n = start + o_c % BLOCK_N
        m_k = (o_n < end)[:, None] & m_d
        p_bk = p_marks + ((o_c // BLOCK_N) * s_lm + o_n.to(tl.int64) * s_ln)[:, None]
        b_mass = tl.zeros([TILES * ROWS, BLOCK_N], dtype=tl.float32)
        b_square = tl.zeros([TILES * ROWS, BLOCK_N], dtype=tl.float32)
        for _ in range(0, MARKS, SOME):
            b_k = tl.load(p_bk, mask=m_k, other=0.0)
            p_bk += SOME * s_lm
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            b_p = tl.math.exp2(b_s * scale_log2 - b_total[:, None])
            b_mass += tl.sum(tl.reshape(b_p, [TILES * ROWS, SOME, BLOCK_N]), 1)
            b_square += tl.sum(tl.reshape(b_p * b_p, [TILES * ROWS, SOME, BLOCK_N]), 1)
        o_n = start + o_b
        m_k = (o_n < end)[:, None] & m_d
        p_bk = p_marks + (MARKS - 1) * s_lm + o_n.to(tl.int64)[:, None] * s_ln
        b_k = tl.load(p_bk, mask=m_k, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_p = tl.math.exp2(b_s * scale_log2 - b_total[:, None])
        b_mass += (block - MARKS) * b_p
        b_square += (block - MARKS) * b_p * b_p
        # Else the cost may leave float32.
        b_mass = tl.minimum(b_mass, 2.0**63)
        b_square = tl.minimum(b_square, 2.0**120)
        b_k = tl.load(p_k + o_n[:, None].to(tl.int64) * s_kn, mask=m_k, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_a = tl.math.exp2(tl.minimum(b_s * scale_log2 - b_total[:, None], 57.0))
        b_cost = (b_square + b_a * (block * b_a - 2 * b_mass)) * b_rows[:, None]
        b_cost = tl.maximum(tl.sum(tl.reshape(b_cost, [TILES, ROWS, BLOCK_N]), 1), 0.0)
        m_c = o_n[None, :] < b_far[:, None]
        tl.store(p_cost[:, None] + o_n[None, :], b_cost, mask=m_c)
