# mypy: disable-error-code="no-untyped-def"
"""One new token into a bounded cache: a program for each kv head, and nothing beside it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from dynmask.masks.lifetimes import NEVER
from dynmask.masks.triton.library import LIBRARY, fake
from dynmask.masks.triton.select_kernels import ranks
from dynmask.ops.triton.common import launches_early

# Slots that a program looks at in one step.
_BLOCK = 4096
_CHANGED = ("kept_k", "kept_v", "kept_score", "order", "expiry")


def insert(
    kept_k: Tensor,
    kept_v: Tensor,
    kept_score: Tensor,
    order: Tensor,
    expiry: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    present: Tensor | None,
    threshold: float | None,
) -> None:
    """Write one token a batch row into the slots, in place; see `dynmask.ops.bounded.BoundedKeys`.

    Reads the scores and orders of all slots and writes one of them: one launch, no memory, no wait.

    Args:
        kept_k: ``[B, G, W, D]``, contiguous.
        kept_v: ``[B, G, W, D]``, contiguous.
        kept_score: ``[B, G, W]`` float32, contiguous.
        order: ``[B, G, W]`` int32, contiguous.
        expiry: ``[B, G, W]`` int32, contiguous.
        k: ``[B, G, 1, D]``, any strides.
        v: ``[B, G, 1, D]``.
        score: ``[B, G, 1]`` float.
        present: ``[B]`` bool, or None for all True.
        threshold: Lowest score that is admitted, or None.
    """
    # An operator costs the host a third of the launch: only tracing needs it.
    call = torch.ops.dynmask.bounded_insert if torch.compiler.is_compiling() else _launch
    call(kept_k, kept_v, kept_score, order, expiry, k, v, score, present, threshold)


def _launch(
    kept_k: Tensor,
    kept_v: Tensor,
    kept_score: Tensor,
    order: Tensor,
    expiry: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    present: Tensor | None,
    threshold: float | None,
) -> None:
    batch, groups, slots, dim = kept_k.shape
    block = min(_BLOCK, triton.next_power_of_2(slots))
    if k.stride(3) != 1 or v.stride(3) != 1:
        k, v = k.contiguous(), v.contiguous()
    s_kb, s_kg, *_ = k.stride()
    s_vb, s_vg, *_ = v.stride()
    s_sb, s_sg, _ = score.stride()
    with torch.cuda.device_of(kept_k):
        insert_kernel[(batch * groups,)](
            kept_k,
            kept_v,
            kept_score,
            order,
            expiry,
            k,
            v,
            score,
            present,
            s_kb,
            s_kg,
            s_vb,
            s_vg,
            s_sb,
            s_sg,
            0 if present is None else present.stride(0),
            0.0 if threshold is None else threshold,
            groups,
            HAS_PRESENT=present is not None,
            HAS_THRESHOLD=threshold is not None,
            NEVER=NEVER,
            EARLY=launches_early(kept_k.device),
            W=slots,
            D=dim,
            BLOCK=block,
            BLOCK_D=triton.next_power_of_2(dim),
            num_warps=max(1, min(8, block // 256)),
        )


LIBRARY.define("bounded_insert" + torch.library.infer_schema(_launch, mutates_args=_CHANGED))
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("bounded_insert", _launch, _key)


@fake("bounded_insert")
def _(
    kept_k: Tensor,
    kept_v: Tensor,
    kept_score: Tensor,
    order: Tensor,
    expiry: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    present: Tensor | None,
    threshold: float | None,
) -> None:
    return None


@triton.jit(do_not_specialize=["s_sb", "s_sg", "s_present", "threshold", "G"])
def insert_kernel(
    p_kept_k,
    p_kept_v,
    p_kept_score,
    p_order,
    p_expiry,
    p_k,
    p_v,
    p_score,
    p_present,
    s_kb,
    s_kg,
    s_vb,
    s_vg,
    s_sb,
    s_sg,
    s_present,
    threshold,
    G,
    HAS_PRESENT: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    NEVER: tl.constexpr,
    EARLY: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Overwrite the slot that loses against all others, if the new token beats it."""
    if EARLY:
        # Decode, which comes next, may be launched meanwhile; it waits for this to end.
        gdc_launch_dependents()
    LATEST: tl.constexpr = 0xFFFFFFFF
    HIGHEST: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    LOWEST_SCORE: tl.constexpr = -0x7F800001  # What `ranks` makes of -inf.
    i_bg = tl.program_id(0).to(tl.int64)
    i_b = i_bg // G
    i_g = i_bg % G
    p_kept_score += i_bg * W
    p_order += i_bg * W
    p_expiry += i_bg * W
    # Two numbers in one: first the score, then how early the key came. An empty slot, of order -1,
    # is a key of -inf that came last of all.
    worst = tl.full([], HIGHEST, tl.int64)
    slot = tl.full([], 0, tl.int32)
    newest = tl.full([], -1, tl.int32)
    for start in range(0, W, BLOCK):
        o_w = start + tl.arange(0, BLOCK)
        m_w = o_w < W
        b_order = tl.load(p_order + o_w, mask=m_w, other=-1)
        b_rank = ranks(p_kept_score, p_kept_score, o_w, m_w, 1, 0, False)
        b_rank = tl.where(b_order < 0, LOWEST_SCORE, b_rank).to(tl.int64)
        b_key = b_rank * 0x100000000 + (LATEST - (b_order.to(tl.int64) & LATEST))
        b_key = tl.where(m_w, b_key, HIGHEST)
        lowest = tl.min(b_key, 0)
        at = tl.min(tl.where(b_key == lowest, o_w, W), 0)
        slot = tl.where(lowest < worst, at, slot)
        worst = tl.minimum(lowest, worst)
        newest = tl.maximum(newest, tl.max(b_order, 0))
    order = newest + 1
    rank = ranks(p_score + i_b * s_sb, p_score, i_g, i_g >= 0, s_sg, 0, False)
    taken = rank.to(tl.int64) * 0x100000000 + (LATEST - order.to(tl.int64)) > worst
    score = tl.load(p_score + i_b * s_sb + i_g * s_sg).to(tl.float32)
    if HAS_THRESHOLD:
        taken = taken & (score >= threshold)
    if HAS_PRESENT:
        taken = taken & (tl.load(p_present + i_b * s_present) != 0)
    if taken:
        o_d = tl.arange(0, BLOCK_D)
        m_d = o_d < D
        kept = (i_bg * W + slot) * D + o_d
        b_k = tl.load(p_k + i_b * s_kb + i_g * s_kg + o_d, mask=m_d)
        b_v = tl.load(p_v + i_b * s_vb + i_g * s_vg + o_d, mask=m_d)
        tl.store(p_kept_k + kept, b_k, mask=m_d)
        tl.store(p_kept_v + kept, b_v, mask=m_d)
        tl.store(p_kept_score + slot, score)
        tl.store(p_order + slot, order)
        tl.store(p_expiry + slot, NEVER)
