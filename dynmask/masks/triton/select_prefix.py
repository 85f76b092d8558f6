# mypy: disable-error-code="no-untyped-def"
"""What a prefix keeps: where a selection begins that asks for later rows only.

A program holds a block of keys in registers, finds its best ``keep`` by bisection and lists them in
order of slots. Blocks of these lists are narrowed in the same way until one is left. Decode needs
no more: what the last row keeps is what all keys as a prefix keep.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynmask.masks.lifetimes import NEVER
from dynmask.masks.triton.select_kernels import ranks
from dynmask.masks.triton.select_lists import Lists

BLOCKS = (2**12, 2**14, 2**15)
"""Keys that a program can hold; half as many if there are segments."""


def prefix_of(offset: int, count: int, keep: int, *, segmented: bool) -> int:
    """Return how many keys to take as a prefix if rows from ``offset`` on count; 0 for none.

    All of them for the last row. None where blocks would not narrow the prefix down: it must be one
    block, or each must lose half of its keys.
    """
    prefix = count if offset >= count - 1 else offset
    most = BLOCKS[-1] // (2 if segmented else 1)
    return prefix if prefix <= most or 2 * keep <= most else 0


def kept_and_own(
    score: Tensor,
    keep: int,
    segment: Tensor | None,
    expiry: Tensor,
    *,
    prefix: int,
    blocks: tuple[int, ...],
) -> tuple[Lists, Tensor]:
    """Find the best ``keep`` keys of a prefix, all it has if there are fewer.

    Args:
        score: ``[B, G, K]`` float, any strides.
        keep: ``w``, at least 1.
        segment: ``[B, K]`` int32, or None.
        expiry: ``[B, G, K]`` int32, contiguous, is written: `NEVER` for these keys and those behind
            the prefix, the own slot for the others.
        prefix: At least 1.
        blocks: Ascending; ``prefix`` or ``2 keep`` is at most the largest, half of it with
            segments.

    Returns:
        The node of `select` that holds these keys as old and those behind the prefix as own ones;
        if there are none behind it, nothing.
    """
    batch, groups, count = score.shape
    heads, own = batch * groups, count - prefix
    kind = torch.int32 if segment is None else torch.int64
    like = score.new_empty(0, dtype=kind)
    # Own entries begin anywhere, and 16 of them are loaded at a time.
    root = Lists.empty(heads, min(keep, prefix) + own + 16 if own else 0, like=like)
    node = torch.empty(heads, 3, dtype=torch.int32, device=score.device)
    made = root
    entries, first = prefix, True
    while True:
        block = _block(entries, blocks, kind)
        chunks = triton.cdiv(entries, block)
        last = chunks == 1
        lists, made = made, root if last else Lists.empty(heads, chunks * keep, like=like)
        options = {
            "LISTED": not last or own > 0,
            "LOWEST": torch.iinfo(kind).min,
            "BLOCK": block,
            "MOVED": min(block // 2, 4096),
            # Few warps: what does not depend on the keys of a thread is repeated by each.
            "num_warps": 16 if block > 4096 else 8,
        }
        if first:
            programs = chunks + triton.cdiv(own, block)
            kept_kernel[(heads * programs,)](
                score,
                segment,
                *made,
                *root,
                node,
                expiry,
                count,
                prefix,
                keep,
                groups,
                chunks,
                programs,
                made.key.stride(0),
                root.key.stride(0),
                *score.stride(),
                *((0, 0) if segment is None else segment.stride()),
                SEGMENTS=segment is not None,
                NEVER=NEVER,
                **options,
            )
        else:
            narrow_kernel[(heads * chunks,)](
                *lists,
                *made,
                expiry,
                count,
                entries,
                keep,
                chunks,
                lists.key.stride(0),
                made.key.stride(0),
                **options,
            )
        if last:
            return root, node
        entries = (chunks - 1) * keep + min(keep, entries - (chunks - 1) * block)
        first = False


def _block(entries: int, blocks: tuple[int, ...], kind: torch.dtype) -> int:
    """Return the least block that holds the entries, or the largest."""
    sizes = [block * 32 // torch.iinfo(kind).bits for block in blocks]
    return next((size for size in sizes if size >= entries), sizes[-1])


@triton.jit
def _threshold(b_key, count, k, LOWEST: tl.constexpr, BLOCK: tl.constexpr):
    """Return the ``k``-th best key, ``1 <= k <= count``, and how many that equal it to take.

    Bisection, which stops as soon as a key parts exactly ``k`` entries from the rest; then it is
    that key and all that equal it are taken, ``count``. Behind ``count`` the keys must be LOWEST.
    """
    HIGHEST: tl.constexpr = -(LOWEST + 1)
    # Always: n_low entries are at least low, n_low >= k; n_high are at least high, n_high < k.
    low = tl.min(tl.where(tl.arange(0, BLOCK) < count, b_key, HIGHEST), 0)
    high = tl.max(b_key, 0) + 1
    n_low = count
    n_high = 0
    while (n_low != k) & (high > low + 1):
        middle = (low & high) + ((low ^ high) >> 1)
        n_middle = tl.sum((b_key >= middle).to(tl.int32), 0)
        enough = n_middle >= k
        low = tl.where(enough, middle, low)
        n_low = tl.where(enough, n_middle, n_low)
        high = tl.where(enough, high, middle)
        n_high = tl.where(enough, n_high, n_middle)
    return low, tl.where(n_low == k, count, k - n_high)


@triton.jit
def _take(b_key, low, equal, count):
    """Return which entries to take, of those that equal ``low`` the first ``equal``."""
    m_take = b_key >= low
    if equal < count:
        b_equal = (b_key == low).to(tl.int32)
        m_take = (b_key > low) | (m_take & (tl.cumsum(b_equal, 0) <= equal))
        equal -= tl.sum(b_equal, 0)
    return m_take, equal


@triton.jit
def _append(p_key, p_slot, found, b_key, b_slot, m_take):
    """Store the entries to take behind the ``found`` ones; return how many there are then."""
    b_take = m_take.to(tl.int32)
    o_to = found + tl.cumsum(b_take, 0) - 1
    tl.store(p_key + o_to, b_key, mask=m_take)
    tl.store(p_slot + o_to, b_slot, mask=m_take)
    return found + tl.sum(b_take, 0)


@triton.jit(do_not_specialize=["count", "prefix", "keep", "groups", "chunks", "programs"])
def kept_kernel(
    p_score,
    p_segment,
    p_to_key,
    p_to_slot,
    p_root_key,
    p_root_slot,
    p_root,
    p_expiry,
    count,
    prefix,
    keep,
    groups,
    chunks,
    programs,
    row_to,
    row_root,
    s_b,
    s_g,
    s_k,
    s_segment_b,
    s_segment_k,
    SEGMENTS: tl.constexpr,
    NEVER: tl.constexpr,
    LISTED: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
    MOVED: tl.constexpr,
):
    """List the best ``keep`` keys of each chunk of the prefix, or hand on BLOCK keys behind it."""
    i_bg = (tl.program_id(0) // programs).to(tl.int64)
    i_c = tl.program_id(0) % programs
    i_b = i_bg // groups
    i_g = i_bg % groups
    p_score += i_b * s_b + i_g * s_g
    if SEGMENTS:
        p_segment += i_b * s_segment_b
    p_expiry += i_bg * count
    kept = tl.minimum(keep, prefix)
    if i_c == 0:
        tl.store(p_root + i_bg * 3, kept)
        tl.store(p_root + i_bg * 3 + 1, count - prefix)
        tl.store(p_root + i_bg * 3 + 2, keep)
    if i_c < chunks:
        first = i_c * BLOCK
        end = tl.minimum(first + BLOCK, prefix)
        o_all = first + tl.arange(0, BLOCK)
        m_all = o_all < end
        b_all = ranks(p_score, p_segment, o_all, m_all, s_k, s_segment_k, SEGMENTS)
        b_all = tl.where(m_all, b_all, LOWEST)
        here = end - first
        low, equal = _threshold(b_all, here, tl.minimum(keep, here), LOWEST, BLOCK)
        to = i_bg * row_to + i_c * keep
        # To read the scores again costs less than to hold all that follows in registers.
        for start in range(first, end, MOVED):
            o_k = start + tl.arange(0, MOVED)
            m_k = o_k < end
            b_key = ranks(p_score, p_segment, o_k, m_k, s_k, s_segment_k, SEGMENTS)
            b_key = tl.where(m_k, b_key, LOWEST)
            m_take, equal = _take(b_key, low, equal, here)
            tl.store(p_expiry + o_k, tl.where(m_take, NEVER, o_k), mask=m_k)
            if LISTED:
                to = _append(p_to_key, p_to_slot, to, b_key, o_k, m_take)
    else:
        first = prefix + (i_c - chunks) * BLOCK
        p_root_key += i_bg * row_root + kept - prefix
        p_root_slot += i_bg * row_root + kept - prefix
        for start in range(first, tl.minimum(first + BLOCK, count), MOVED):
            o_k = start + tl.arange(0, MOVED)
            m_k = o_k < tl.minimum(first + BLOCK, count)
            b_key = ranks(p_score, p_segment, o_k, m_k, s_k, s_segment_k, SEGMENTS)
            tl.store(p_root_key + o_k, b_key, mask=m_k)
            tl.store(p_root_slot + o_k, o_k, mask=m_k)
            tl.store(p_expiry + o_k, tl.full([MOVED], NEVER, tl.int32), mask=m_k)


@triton.jit(do_not_specialize=["count", "entries", "keep", "chunks"])
def narrow_kernel(
    p_key,
    p_slot,
    p_to_key,
    p_to_slot,
    p_expiry,
    count,
    entries,
    keep,
    chunks,
    row,
    row_to,
    LISTED: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
    MOVED: tl.constexpr,
):
    """List the best ``keep`` of each BLOCK entries; the others expire at their own slot."""
    i_bg = (tl.program_id(0) // chunks).to(tl.int64)
    i_c = tl.program_id(0) % chunks
    here = tl.minimum(BLOCK, entries - i_c * BLOCK)
    p_key += i_bg * row + i_c * BLOCK
    p_slot += i_bg * row + i_c * BLOCK
    p_expiry += i_bg * count
    o_all = tl.arange(0, BLOCK)
    b_all = tl.load(p_key + o_all, mask=o_all < here, other=LOWEST)
    low, equal = _threshold(b_all, here, tl.minimum(keep, here), LOWEST, BLOCK)
    to = i_bg * row_to + i_c * keep
    for start in range(0, here, MOVED):
        o = start + tl.arange(0, MOVED)
        m_o = o < here
        b_key = tl.load(p_key + o, mask=m_o, other=LOWEST)
        b_slot = tl.load(p_slot + o, mask=m_o, other=0)
        m_take, equal = _take(b_key, low, equal, here)
        tl.store(p_expiry + b_slot, b_slot, mask=m_o & (m_take == 0))
        if LISTED:
            to = _append(p_to_key, p_to_slot, to, b_key, b_slot, m_take)
