# mypy: disable-error-code="no-untyped-def"
"""The forward kernel for Hopper GPUs: copies, products and the softmax overlap.

Triton's own pipeline waits for each product before it goes on. Here (Gluon, Triton's lower level)
four warps only copy the listed keys and values to shared memory, and two groups of four warps, each
with half of the rows, compute. A group issues the logits of block ``j + 1`` and the product of
block ``j``'s probabilities with its values together, and does the softmax of ``j + 1`` beside the
latter. The two groups are not in step, so that one's softmax also runs beside the other's products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynmask.masks.triton.schedule import TILE, TileLists
from dynmask.ops.triton.common import LOG2E, int32_offsets
from dynmask.ops.triton.gluon import (
    arrive_when_copied,
    async_load,
    barrier,
    gl,
    gluon,
    hopper,
    mbarrier,
)

# Rows of a computing group: as many as a product of four warps has.
ROWS = 64
BLOCK_N = 128


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    expiry: Tensor,
    lists: TileLists | None,
    scale: float,
    immortal: bool,
    tile: int = TILE,
) -> tuple[Tensor, Tensor]:
    """Do what `dynmask.ops.triton.forward.forward` does, where `fits`."""
    batch, heads, q_len, dim = q.shape
    groups, k_len = k.shape[1], k.shape[2]
    ratio = heads // groups
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    t0 = (k_len - q_len) // tile
    tiles = -(-k_len // tile) - t0
    parts = -(-tile * ratio // (2 * ROWS))
    _forward_kernel[(tiles * parts, batch * groups)](
        q,
        k,
        v,
        q if bias is None else bias,
        expiry,
        # Without lists their pointers are not read, but Gluon needs tensors there.
        *((expiry, expiry, expiry) if lists is None else lists),
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
        HAS_BIAS=bias is not None,
        LISTED=lists is not None,
        IMMORTAL=immortal,
        WIDE=not int32_offsets(k, v),
        TILE=tile,
        ROWS=ROWS,
        BLOCK_N=BLOCK_N,
        num_warps=4,
    )
    return out, lse


@gluon.jit(
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
    R: gl.constexpr,
    D: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    LISTED: gl.constexpr,
    IMMORTAL: gl.constexpr,
    WIDE: gl.constexpr,
    TILE: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    dtype: gl.constexpr = p_q.dtype.element_ty
    parts: gl.constexpr = (TILE * R + 2 * ROWS - 1) // (2 * ROWS)
    i_t = tiles - 1 - gl.program_id(0) // parts  # Prefixes: the longest first.
    i_part = gl.program_id(0) % parts
    i_b = (gl.program_id(1) // G).to(gl.int64)
    i_g = (gl.program_id(1) % G).to(gl.int64)
    p_q += i_b * s_qb + i_g * R * s_qh
    p_k += i_b * s_kb + i_g * s_kg
    p_v += i_b * s_vb + i_g * s_vg
    p_out += i_b * s_ob + i_g * R * s_oh
    p_lse += (i_b * G + i_g) * R * Q
    p_bias += i_b * s_bb + i_g * s_bg
    p_expiry += i_b * s_eb + i_g * s_eg
    if LISTED:
        p_keys += i_b * s_lb + i_g * s_lg + i_t * s_lt
    i_list = (i_b * G + i_g) * tiles + i_t
    a = (t0 + i_t) * TILE
    if LISTED:
        n_full = gl.load(p_full + i_list)
        total = n_full + gl.load(p_partial + i_list)
    else:
        total = gl.minimum(a + TILE, K)
        n_full = a + 1 if IMMORTAL else 0

    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], dtype)
    column_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(dtype, [2, ROWS, D], rows_layout)
    k_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_N, D], rows_layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_N, D], rows_layout)
    bias_smem = gl.allocate_shared_memory(gl.float32, [2, BLOCK_N], column_layout)
    limits_smem = gl.allocate_shared_memory(gl.int32, [2, BLOCK_N], column_layout)
    # Copied: one arrival from each copying thread. Limits: one. Free: one from each group.
    k_copied = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_copied = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    limits = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(k_copied.index(i), count=128)
        mbarrier.init(v_copied.index(i), count=128)
        mbarrier.init(limits.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    hopper.fence_async_shared()

    columns = (k_smem, v_smem, bias_smem, limits_smem)
    barriers = (k_copied, v_copied, limits, k_free, v_free)
    listed = (p_keys, n_full, total, s_lt - total, a)
    queries = (p_q, s_qh, s_qn, p_out, s_oh, s_on, p_lse, Q, K, scale_log2)
    first = i_part * 2 * ROWS
    gl.warp_specialize(
        [
            (
                _compute,
                (q_smem.index(0), first, columns, barriers, listed, queries, R, HAS_BIAS, TILE),
            ),
            (
                _compute,
                (
                    q_smem.index(1),
                    first + ROWS,
                    columns,
                    barriers,
                    listed,
                    queries,
                    R,
                    HAS_BIAS,
                    TILE,
                ),
            ),
            (
                _copy,
                (
                    p_k,
                    s_kn,
                    p_v,
                    s_vn,
                    p_bias,
                    p_expiry,
                    columns,
                    barriers,
                    listed,
                    HAS_BIAS,
                    LISTED,
                    WIDE,
                    TILE,
                ),
            ),
        ],
        [4, 4],
        [224, 64],
    )


@gluon.jit
def _copy(
    p_k,
    s_kn,
    p_v,
    s_vn,
    p_bias,
    p_expiry,
    columns,
    barriers,
    listed,
    HAS_BIAS: gl.constexpr,
    LISTED: gl.constexpr,
    WIDE: gl.constexpr,
    TILE: gl.constexpr,
):
    """Bring block after block of the list's keys, values, biases and limits to shared memory."""
    k_smem, v_smem, _, _ = columns
    k_copied, v_copied, limits, k_free, v_free = barriers
    _, _, total, _, _ = listed
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    for block in range(gl.maximum((total + BLOCK_N - 1) // BLOCK_N, 1)):
        i = block % 2
        phase = (block // 2 + 1) % 2
        copy_columns(
            columns, k_free, limits, p_bias, p_expiry, listed, block, HAS_BIAS, LISTED, TILE
        )
        gather_keys(k_smem.index(i), p_k, s_kn, listed, block, LISTED, WIDE)
        arrive_when_copied(k_copied.index(i), increment_count=False)
        mbarrier.wait(v_free.index(i), phase)
        gather_keys(v_smem.index(i), p_v, s_vn, listed, block, LISTED, WIDE)
        arrive_when_copied(v_copied.index(i), increment_count=False)


@gluon.jit
def copy_columns(
    columns,
    free,
    limits,
    p_bias,
    p_expiry,
    listed,
    block,
    HAS_BIAS: gl.constexpr,
    LISTED: gl.constexpr,
    TILE: gl.constexpr,
):
    """Await a block's buffers, then bring its biases, and births and deaths if a row needs them.

    Births and deaths as rows of the tile, in the halves of an int32: registers are what the
    computing groups are short of.
    """
    k_smem, _, bias_smem, limits_smem = columns
    _, n_full, total, _, a = listed
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    i = block % 2
    o = block * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.BlockedLayout([1], [32], [4], [0]))
    o_j = listed_keys(listed, o, LISTED)
    mbarrier.wait(free.index(i), (block // 2 + 1) % 2)
    if HAS_BIAS:
        async_load(bias_smem.index(i), p_bias + o_j)
    if (block + 1) * BLOCK_N > n_full:
        b_e = gl.load(p_expiry + o_j, mask=o < total, other=0)
        birth = gl.minimum(gl.maximum(o_j - a, 0), TILE)
        death = gl.minimum(gl.maximum(b_e, a) - a, TILE)
        limits_smem.index(i).store(birth + (death << 16))
        barrier()
        mbarrier.arrive(limits.index(i), count=1)


@gluon.jit
def listed_keys(listed, o, LISTED: gl.constexpr):
    """Return the key slots at places ``o`` of a tile's list, or of its prefix; 0 past the end."""
    p_keys, n_full, total, jump, _ = listed
    if LISTED:
        return gl.load(p_keys + o + gl.where(o < n_full, 0, jump), mask=o < total, other=0)
    return gl.where(o < total, o, 0)


@gluon.jit
def gather_keys(smem, p_rows, s_n, listed, block, LISTED: gl.constexpr, WIDE: gl.constexpr):
    """Copy one block's rows, a few at a time: the copying warps have few registers."""
    BLOCK_N: gl.constexpr = smem.shape[0]
    D: gl.constexpr = smem.shape[1]
    STEP: gl.constexpr = 32
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, copies))
    for step in gl.static_range(BLOCK_N // STEP):
        o = block * BLOCK_N + step * STEP + gl.arange(0, STEP, layout=gl.SliceLayout(1, copies))
        o_j = listed_keys(listed, o, LISTED)
        o_row = o_j.to(gl.int64) if WIDE else o_j
        p = p_rows + gl.expand_dims(o_row, 1) * s_n + gl.expand_dims(o_d, 0)
        async_load(smem.slice(step * STEP, STEP), p)


@gluon.jit
def _compute(
    q_smem,
    first,
    columns,
    barriers,
    listed,
    queries,
    R: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    TILE: gl.constexpr,
):
    """Attend from ``ROWS`` packed rows, from ``first`` on, to the blocks as they come."""
    k_smem, v_smem, bias_smem, limits_smem = columns
    k_copied, v_copied, limits, k_free, v_free = barriers
    _, n_full, total, _, a = listed
    p_q, s_qh, s_qn, p_out, s_oh, s_on, p_lse, Q, K, scale_log2 = queries
    ROWS: gl.constexpr = q_smem.shape[0]
    D: gl.constexpr = q_smem.shape[1]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    dtype: gl.constexpr = q_smem.dtype
    moves: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    factors: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    rows: gl.constexpr = gl.SliceLayout(1, logits)

    # The R query heads of the kv head are packed along the rows: row m is token m // R, head m % R.
    o_m = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, moves))
    o_d = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, moves)), 0)
    o_q = (a + o_m // R - (K - Q)).to(gl.int64)
    m_m = (o_m < TILE * R) & (o_q >= 0) & (o_q < Q)
    p_bq = p_q + gl.expand_dims((o_m % R) * s_qh + o_q * s_qn, 1) + o_d
    q_smem.store(gl.load(p_bq, mask=gl.expand_dims(m_m, 1), other=0.0))

    o_row = (first + gl.arange(0, ROWS, layout=rows)) // R
    b_max = gl.full([ROWS], float("-inf"), gl.float32, rows)
    b_sum = gl.full([ROWS], 0.0, gl.float32, rows)
    b_acc = gl.full([ROWS, D], 0.0, gl.float32, sums)
    zeros = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, logits)
    barrier()

    mbarrier.wait(k_copied.index(0), 0)
    hopper.fence_async_shared()
    b_s = hopper.warpgroup_mma(q_smem, k_smem.index(0).permute((1, 0)), zeros, use_acc=False)
    if n_full < BLOCK_N:
        mbarrier.wait(limits.index(0), 0)
    shared = (bias_smem.index(0), limits_smem.index(0))
    b_p, b_max, b_sum, b_alpha = _softmax(
        b_s, b_max, b_sum, n_full >= BLOCK_N, o_row, shared, scale_log2, HAS_BIAS
    )
    mbarrier.arrive(k_free.index(0), count=1)
    b_a = gl.convert_layout(b_p.to(dtype), factors)
    blocks = (total + BLOCK_N - 1) // BLOCK_N
    for block in range(1, blocks):
        i = block % 2
        phase = block // 2 % 2
        mbarrier.wait(k_copied.index(i), phase)
        hopper.fence_async_shared()
        t_s = hopper.warpgroup_mma(
            q_smem, k_smem.index(i).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        mbarrier.wait(v_copied.index(1 - i), (block - 1) // 2 % 2)
        hopper.fence_async_shared()
        t_acc = hopper.warpgroup_mma(b_a, v_smem.index(1 - i), b_acc, is_async=True)
        b_s = hopper.warpgroup_mma_wait(1, deps=[t_s])
        is_full = (block + 1) * BLOCK_N <= n_full
        if is_full == 0:
            # Full blocks come first, so a buffer's limits are awaited only once they are written.
            mbarrier.wait(limits.index(i), (block // 2 - (n_full // BLOCK_N + 1 - i) // 2) % 2)
        shared = (bias_smem.index(i), limits_smem.index(i))
        b_p, b_max, b_sum, b_alpha = _softmax(
            b_s, b_max, b_sum, is_full, o_row, shared, scale_log2, HAS_BIAS
        )
        mbarrier.arrive(k_free.index(i), count=1)
        b_acc = hopper.warpgroup_mma_wait(0, deps=[t_acc])
        mbarrier.arrive(v_free.index(1 - i), count=1)
        b_acc = b_acc * gl.expand_dims(gl.convert_layout(b_alpha, gl.SliceLayout(1, sums)), 1)
        b_a = gl.convert_layout(b_p.to(dtype), factors)
    last = gl.maximum(blocks - 1, 0)
    mbarrier.wait(v_copied.index(last % 2), last // 2 % 2)
    hopper.fence_async_shared()
    b_acc = hopper.warpgroup_mma(b_a, v_smem.index(last % 2), b_acc)

    empty = b_sum == 0
    b_divisor = gl.convert_layout(gl.where(empty, 1.0, b_sum), gl.SliceLayout(1, sums))
    b_out = gl.convert_layout((b_acc / gl.expand_dims(b_divisor, 1)).to(dtype), moves)
    p_bo = p_out + gl.expand_dims((o_m % R) * s_oh + o_q * s_on, 1) + o_d
    gl.store(p_bo, b_out, mask=gl.expand_dims(m_m, 1))
    b_lse = gl.where(empty, float("-inf"), (b_max + gl.log2(b_sum)) * 0.6931471805599453)
    p_bl = p_lse + (o_m % R) * Q + o_q
    gl.store(p_bl, gl.convert_layout(b_lse, gl.SliceLayout(1, moves)), mask=m_m)


@gluon.jit
def _softmax(b_s, b_max, b_sum, is_full, o_row, shared, scale_log2, HAS_BIAS: gl.constexpr):
    """Return probabilities, new maximum, new sum and the factor of what was summed before."""
    bias_smem, limits_smem = shared
    columns: gl.constexpr = gl.SliceLayout(0, b_s.type.layout)
    b_s = b_s * scale_log2
    if HAS_BIAS:
        b_s += gl.expand_dims(bias_smem.load(columns) * 1.4426950408889634, 0)
    if is_full == 0:
        b_limits = gl.expand_dims(limits_smem.load(columns), 0)
        o_r = gl.expand_dims(o_row, 1)
        b_s = gl.where(((b_limits & 0xFFFF) <= o_r) & (o_r < (b_limits >> 16)), b_s, float("-inf"))
    b_new = gl.maximum(b_max, gl.max(b_s, 1))
    # A row that has seen no key yet has the maximum -inf: subtract 0 there, or -inf - -inf is NaN.
    b_safe = gl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = gl.exp2(b_s - gl.expand_dims(b_safe, 1))
    b_alpha = gl.exp2(b_max - b_safe)
    return b_p, b_new, b_sum * b_alpha + gl.sum(b_p, 1), b_alpha
