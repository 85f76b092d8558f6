# mypy: disable-error-code="no-untyped-def"
"""What a block's summary would cost a tile of query rows, on the GPU, in two kernels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynmask.dam.dynamic_cost import FIRST
from dynmask.ops.triton.common import LOG2E, dot_precision, padded_dim

if TYPE_CHECKING:
    from dynmask.dam.dynamic_keys import Keys

# Blocks that one program walks over, and where that would make few programs.
_CHUNK = 128
_SHORT_CHUNK = 32
_MANY = 512


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
        ``[B, G, T, count]`` float32; what is not far is not written.
    """
    batch, groups, tiles, some, dim = rows.shape
    marks = keys.landmarks.shape[2]
    few = min(FIRST, marks - 1)
    cost = torch.empty(batch, groups, tiles, count, dtype=torch.float32, device=rows.device)
    total = torch.empty(batch, groups, tiles, some, dtype=torch.float32, device=rows.device)
    padded = triton.next_power_of_2(some)
    most, columns, near_columns, stages = _sizes(rows)
    of_tiles = max(1, most // padded, 16 // padded)
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
    # Few blocks are shared out over more programs than their number would fill.
    chunk = _CHUNK if programs * batch * groups * count >= _MANY * _CHUNK else _SHORT_CHUNK
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
            BLOCK_N=near_columns,
            num_stages=min(stages, 2),
        )
        _cost_kernel[(programs, triton.cdiv(count, chunk), batch * groups)](
            rows,
            far,
            keys.landmarks,
            total,
            cost,
            *strides,
            *keys.landmarks.stride()[:4],
            scale * LOG2E,
            groups,
            tiles,
            count,
            keys.block,
            every,
            **constants,
            MARKS=marks,
            COLUMNS=max(columns, marks),
            CHUNK=chunk,
            num_stages=stages,
        )
    return cost


def _sizes(rows: Tensor) -> tuple[int, int, int, int]:
    """Return rows, landmarks, near keys and pipeline stages of a program.

    Logits fit the registers, and queries and keys the 99 KiB of shared memory that any GPU since
    2018 but Turing has, at up to 64 landmarks a block.
    """
    dim = padded_dim(rows.shape[-1])
    if rows.dtype == torch.float32:
        return (32, 32, 32, 2) if dim <= 128 else (16, 16, 16, 1)
    if dim <= 64:
        return 128, 128, 64, 3
    return (128, 128, 32, 2) if dim <= 128 else (64, 64, 16, 1)


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
    BLOCK_N: tl.constexpr,
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
    for start in range(0, far, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_k = (o_n < far)[:, None] & m_d
        m_s = o_n[None, :] < b_far[:, None]
        b_k = tl.load(p_k + o_n[:, None].to(tl.int64) * s_kn + o_d[None, :], mask=m_k, other=0.0)
        b_others = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2 * block
        p_bk = p_marks + o_n[:, None].to(tl.int64) * s_ln + o_d[None, :]
        for i in tl.static_range(FEW):
            b_k = tl.load(p_bk + i * s_lm, mask=m_k, other=0.0)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
            b_others -= b_s
            b_max, b_sum = _add_up(b_max, b_sum, tl.where(m_s, b_s, float("-inf")))
        b_others = b_others / (block - FEW) + log2_others
        b_max, b_sum = _add_up(b_max, b_sum, tl.where(m_s, b_others, float("-inf")))
    p_k += summaries.to(tl.int64) * s_kn
    b_near = b_far * block
    high = tl.minimum(tl.max(b_at, 0) + 1, last)
    for start in range(tl.min(tl.where(m_m, b_near, last), 0), high, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        p_bk = p_k + o_n[:, None].to(tl.int64) * s_kn + o_d[None, :]
        b_k = tl.load(p_bk, mask=(o_n < high)[:, None] & m_d, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
        m_s = (o_n[None, :] >= b_near[:, None]) & (o_n[None, :] <= b_at[:, None])
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_max, b_sum = _add_up(b_max, b_sum, b_s)
    tl.store(p_total + (i_bg * T + o_t) * S + o_s, b_max + tl.math.log2(b_sum), mask=m_m)


@triton.jit
def _add_up(b_max, b_sum, b_s):
    """Take in more logits; -inf is none."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # -inf - -inf would be NaN.
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_sum = b_sum * tl.math.exp2(b_max - b_safe) + tl.sum(tl.math.exp2(b_s - b_safe[:, None]), 1)
    return b_new, b_sum


@triton.jit(do_not_specialize=["T", "N"])
def _cost_kernel(
    p_q,
    p_far,
    p_marks,
    p_total,
    p_cost,
    s_qb,
    s_qg,
    s_qt,
    s_qs,
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
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Cost one chunk of blocks for a few tiles; a column is one landmark of one block."""
    BLOCKS: tl.constexpr = COLUMNS // MARKS
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
    # The last representative and the last landmark stand for the rest.
    b_rows = tl.where(m_m, tl.where(o_s == S - 1, every - S + 1, 1), 0).to(tl.float32) / every
    o_c = tl.arange(0, COLUMNS)
    o_j = o_c % BLOCKS
    b_keys = tl.where(o_c // BLOCKS == MARKS - 1, block - MARKS + 1, 1).to(tl.float32)[None, :]
    p_marks += (i_bg // G) * s_lb + (i_bg % G) * s_lg
    p_marks += tl.cast(first, tl.int64) * s_ln
    p_bk = p_marks + ((o_c // BLOCKS) * s_lm + o_j * s_ln)[:, None] + o_d[None, :]
    p_cost += (i_bg * T + o_i) * N
    o_b = tl.arange(0, BLOCKS)
    for start in range(first, end, BLOCKS):
        m_n = (start + o_j < end)[:, None] & m_d
        b_k = tl.load(p_bk, mask=m_n, other=0.0)
        p_bk += BLOCKS * s_ln
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
        # Above 2^57 squares would leave float32.
        b_p = tl.math.exp2(tl.minimum(b_s - b_total[:, None], 57.0))
        b_w = b_p * b_keys
        b_mean = _of_blocks(b_s * b_keys, MARKS, BLOCKS) / block
        b_a = tl.math.exp2(tl.minimum(b_mean - b_total[:, None], 57.0))
        b_mass = _of_blocks(b_w, MARKS, BLOCKS)
        b_cost = _of_blocks(b_w * b_p, MARKS, BLOCKS) + b_a * (block * b_a - 2 * b_mass)
        b_cost = tl.reshape(b_cost * b_rows[:, None], [TILES, ROWS, BLOCKS])
        b_cost = tl.maximum(tl.sum(b_cost, 1), 0.0)
        o_n = start + o_b
        m_c = o_n[None, :] < b_far[:, None]
        tl.store(p_cost[:, None] + o_n[None, :], b_cost, mask=m_c)


@triton.jit
def _of_blocks(x, MARKS: tl.constexpr, BLOCKS: tl.constexpr):
    """Sum columns over each block's landmarks."""
    return tl.sum(tl.reshape(x, [x.shape[0], MARKS, BLOCKS]), 1)
