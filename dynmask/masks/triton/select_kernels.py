# mypy: disable-error-code="no-untyped-def"
"""Kernels of the causal top-w selection; `select` says how they work together."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ranks(p_score, p_segment, o_k, m_k, s_k, s_segment_k, SEGMENTS: tl.constexpr):
    """Return integers that rank like segment and score of the slots ``o_k``."""
    b_score = tl.load(p_score + o_k.to(tl.int64) * s_k, mask=m_k, other=0.0).to(tl.float32)
    b_score = tl.where(b_score == b_score, b_score, float("-inf"))
    b_score = tl.where(b_score == 0.0, 0.0, b_score)
    b_bits = b_score.to(tl.int32, bitcast=True)
    # Floats order like sign and magnitude: turn the magnitudes of negative ones round.
    b_key = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    if SEGMENTS:
        b_segment = tl.load(p_segment + o_k * s_segment_k, mask=m_k, other=0).to(tl.int64)
        b_key = b_segment * 0x100000000 + (b_key.to(tl.int64) + 0x80000000)
    return b_key


@triton.jit(do_not_specialize=["count", "keep", "groups", "blocks"])
def encode_kernel(
    p_score,
    p_segment,
    p_key,
    p_slot,
    p_expiry,
    p_root,
    count,
    keep,
    groups,
    blocks,
    row,
    s_b,
    s_g,
    s_k,
    s_segment_b,
    s_segment_k,
    SEGMENTS: tl.constexpr,
    NEVER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write integers that rank like the scores, the slots, `NEVER` as expiry, and the root node."""
    i_bg = (tl.program_id(0) // blocks).to(tl.int64)
    i_block = tl.program_id(0) % blocks
    i_b = i_bg // groups
    i_g = i_bg % groups
    o_k = i_block * BLOCK + tl.arange(0, BLOCK)
    m_k = o_k < count
    p_score += i_b * s_b + i_g * s_g
    if SEGMENTS:
        p_segment += i_b * s_segment_b
    b_key = ranks(p_score, p_segment, o_k, m_k, s_k, s_segment_k, SEGMENTS)
    tl.store(p_key + i_bg * row + o_k, b_key, mask=m_k)
    tl.store(p_expiry + i_bg * count + o_k, tl.full([BLOCK], NEVER, tl.int32), mask=m_k)
    if i_bg == 0:
        tl.store(p_slot + o_k, o_k, mask=m_k)
    if i_block == 0:
        tl.store(p_root + i_bg * 3, 0)
        tl.store(p_root + i_bg * 3 + 1, count)
        tl.store(p_root + i_bg * 3 + 2, keep)


@triton.jit
def _kth_best(p_key, p_slot, count, k, LOWEST: tl.constexpr, BLOCK: tl.constexpr):
    """Return key and slot of the ``k``-th best of a list in order of slots, ``1 <= k <= count``.

    Bisection on the key, which stops as soon as a threshold parts exactly ``k`` entries from the
    rest; entries of equal key are parted by walking along the list. The first block of the list
    stays in registers.
    """
    HIGHEST: tl.constexpr = -(LOWEST + 1)
    o_block = tl.arange(0, BLOCK)
    # The mask of a load changes at multiples of 16 only, so that loads are vectors.
    padded = (count + 15) // 16 * 16
    b_first = tl.load(p_key + o_block, mask=o_block < padded, other=LOWEST)
    b_first = tl.where(o_block < count, b_first, LOWEST)
    b_low = tl.where(o_block < count, b_first, HIGHEST)
    b_high = b_first
    for start in range(BLOCK, count, BLOCK):
        o = start + o_block
        b_key = tl.load(p_key + o, mask=o < padded, other=LOWEST)
        b_low = tl.minimum(b_low, tl.where(o < count, b_key, HIGHEST))
        b_high = tl.maximum(b_high, tl.where(o < count, b_key, LOWEST))
    # Always: n_low entries are at least low, n_low >= k; n_high are at least high, n_high < k.
    low = tl.min(b_low, 0)
    high = tl.max(b_high, 0) + 1
    n_low = count
    n_high = 0
    while (n_low != k) & (high > low + 1):
        middle = (low & high) + ((low ^ high) >> 1)
        b_count = (b_first >= middle).to(tl.int32)
        for start in range(BLOCK, count, BLOCK):
            o = start + o_block
            b_key = tl.load(p_key + o, mask=o < padded, other=LOWEST)
            b_count += ((b_key >= middle) & (o < count)).to(tl.int32)
        n_middle = tl.sum(b_count, 0)
        enough = n_middle >= k
        low = tl.where(enough, middle, low)
        n_low = tl.where(enough, n_middle, n_low)
        high = tl.where(enough, high, middle)
        n_high = tl.where(enough, n_high, n_middle)
    if n_low == k:
        # All from `low` on: the worst of them, of equal ones the last.
        b_worst = tl.where(b_first >= low, b_first, HIGHEST)
        b_at = o_block
        for start in range(BLOCK, count, BLOCK):
            o = start + o_block
            b_key = tl.load(p_key + o, mask=o < padded, other=LOWEST)
            m_worse = (b_key >= low) & (b_key <= b_worst) & (o < count)
            b_worst = tl.where(m_worse, b_key, b_worst)
            b_at = tl.where(m_worse, o, b_at)
        key = tl.min(b_worst, 0)
        at = tl.max(tl.where(b_worst == key, b_at, 0), 0)
    else:
        # More entries equal `low` than are wanted: the earliest ones.
        key = low
        wanted = k - n_high
        start_at = 0
        b_equal = (b_first == key).to(tl.int32)
        here = tl.sum(b_equal, 0)
        while here < wanted:
            wanted -= here
            start_at += BLOCK
            o = start_at + o_block
            b_key = tl.load(p_key + o, mask=o < padded, other=LOWEST)
            b_equal = ((b_key == key) & (o < count)).to(tl.int32)
            here = tl.sum(b_equal, 0)
        b_before = (tl.cumsum(b_equal, 0) < wanted).to(tl.int32)
        at = start_at + tl.sum(b_before, 0)
    return key, tl.load(p_slot + at)


@triton.jit
def _move_between(
    p_key,
    p_slot,
    count,
    low_key,
    low_slot,
    high_key,
    high_slot,
    p_to_key,
    p_to_slot,
    p_expiry,
    OWN: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy, in order, the entries not beaten by ``low`` and, unless OWN, beaten by ``high``.

    With OWN, the entries that ``low`` beats were never kept: they expire at their own slot.
    Returns how many entries were copied.
    """
    found = 0
    for start in range(0, count, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m_o = o < count
        # Own entries start anywhere in the list; the others at its aligned front.
        m_load = m_o if OWN else o < (count + 15) // 16 * 16
        b_key = tl.load(p_key + o, mask=m_load, other=LOWEST)
        b_slot = tl.load(p_slot + o, mask=m_load, other=0)
        m_above = (b_key > low_key) | ((b_key == low_key) & (b_slot <= low_slot))
        if OWN:
            tl.store(p_expiry + b_slot, b_slot, mask=m_o & (m_above == 0))
            m_take = m_o & m_above
        else:
            m_below = (b_key < high_key) | ((b_key == high_key) & (b_slot > high_slot))
            m_take = m_o & m_above & m_below
        b_take = m_take.to(tl.int32)
        taken = tl.sum(b_take, 0)
        if taken > 0:
            o_to = found + tl.cumsum(b_take, 0) - 1
            tl.store(p_to_key + o_to, b_key, mask=m_take)
            tl.store(p_to_slot + o_to, b_slot, mask=m_take)
        found += taken
    return found


@triton.jit(do_not_specialize=["chunks", "count", "keep"])
def best_kernel(
    p_key,
    p_slot,
    p_to_key,
    p_to_slot,
    chunks,
    count,
    keep,
    old,
    row,
    row_slot,
    row_to,
    SIZE: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
    MOVED: tl.constexpr,
):
    """List the best ``keep`` keys of each chunk of SIZE entries, in order of slots.

    In either list the chunks begin behind ``old`` entries.
    """
    i_bg = (tl.program_id(0) // chunks).to(tl.int64)
    i_c = tl.program_id(0) % chunks
    p_key += i_bg * row + old + i_c * SIZE
    p_slot += i_bg * row_slot + old + i_c * SIZE
    here = tl.minimum(SIZE, count - i_c * SIZE)
    low_key, low_slot = _kth_best(p_key, p_slot, here, tl.minimum(keep, here), LOWEST, BLOCK)
    to = i_bg * row_to + old + i_c * keep
    HIGHEST: tl.constexpr = -(LOWEST + 1)
    _move_between(
        p_key,
        p_slot,
        here,
        low_key,
        low_slot,
        low_key * 0 + HIGHEST,
        low_slot,
        p_to_key + to,
        p_to_slot + to,
        p_to_slot,
        False,
        LOWEST,
        MOVED,
    )


@triton.jit(do_not_specialize=["children", "step"])
def worst_kernel(
    p_key,
    p_slot,
    p_node,
    p_low_key,
    p_low_slot,
    children,
    row,
    row_slot,
    step,
    SIZE: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the worst kept entry at the end of each child, or LOWEST while there is room left."""
    i_node = (tl.program_id(0) // children).to(tl.int64)
    i_c = tl.program_id(0) % children
    old = tl.load(p_node + i_node * 3)
    own = tl.load(p_node + i_node * 3 + 1) - i_c * SIZE
    keep = tl.load(p_node + i_node * 3 + 2)
    if own > 0:
        count = old + i_c * step + tl.minimum(own, step)
        to = i_node * children + i_c
        if count >= keep:
            key, slot = _kth_best(
                p_key + i_node * row, p_slot + i_node * row_slot, count, keep, LOWEST, BLOCK
            )
            tl.store(p_low_key + to, key)
            tl.store(p_low_slot + to, slot)
        else:
            tl.store(p_low_key + to, LOWEST)
            tl.store(p_low_slot + to, -1)


@triton.jit
def _expire(
    p_key,
    p_slot,
    old,
    own,
    keep,
    p_expiry,
    LOWEST: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Find when each entry of a node is evicted: where the ``keep``-th entry that beats it stands.

    Every thread follows its entries while all walk along the list.
    """
    o_j = tl.arange(0, 2 * SIZE)
    m_j = o_j < old + own
    b_key = tl.load(p_key + o_j, mask=m_j, other=LOWEST + 1)
    b_slot = tl.load(p_slot + o_j, mask=m_j, other=0)
    b_left = tl.full([2 * SIZE], 0, tl.int32) + keep
    b_end = tl.full([2 * SIZE], -1, tl.int32)
    for first in range(0, old, 8):
        for u in tl.static_range(8):
            i = first + u
            key = tl.where(i < old, tl.load(p_key + i), LOWEST)
            # Of equal keys the earlier one beats.
            b_left -= (key > b_key - (i < o_j).to(b_key.dtype)).to(tl.int32)
    # Where a selection begins, own keys may be there that the old ones refuse.
    b_end = tl.where(b_left == 0, 0, b_end)
    for first in range(0, own, 8):
        for u in tl.static_range(8):
            i = old + tl.minimum(first + u, own - 1)
            key = tl.where(first + u < own, tl.load(p_key + i), LOWEST)
            slot = tl.load(p_slot + i)
            m_beats = key > b_key - (i < o_j).to(b_key.dtype)
            b_left -= m_beats.to(tl.int32)
            b_end = tl.where(m_beats & (b_left == 0), slot, b_end)
    tl.store(p_expiry + b_slot, tl.maximum(b_end, b_slot), mask=m_j & (b_end >= 0))


@triton.jit(do_not_specialize=["children", "nodes", "count", "step"])
def split_kernel(
    p_key,
    p_slot,
    p_own_key,
    p_own_slot,
    p_node,
    p_low_key,
    p_low_slot,
    p_to_key,
    p_to_slot,
    p_to_node,
    p_expiry,
    children,
    nodes,
    count,
    row,
    row_slot,
    row_own,
    row_own_slot,
    step,
    SIZE: tl.constexpr,
    LAST: tl.constexpr,
    LOWEST: tl.constexpr,
    MOVED: tl.constexpr,
):
    """List the entries that matter to each child; at the LAST level, find when they expire."""
    i_node = (tl.program_id(0) // children).to(tl.int64)
    i_c = tl.program_id(0) % children
    i_to = i_node * children + i_c
    p_expiry += i_node // nodes * count
    old = tl.load(p_node + i_node * 3)
    own = tl.load(p_node + i_node * 3 + 1) - i_c * SIZE
    keep = tl.load(p_node + i_node * 3 + 2)
    to_old = 0
    to_own = 0
    to_keep = 0
    if own > 0:
        high_key = tl.load(p_low_key + i_to)
        high_slot = tl.load(p_low_slot + i_to)
        low_key = tl.load(p_low_key + i_to - 1, mask=i_c > 0, other=LOWEST)
        low_slot = tl.load(p_low_slot + i_to - 1, mask=i_c > 0, other=-1)
        # While there is room for all, nothing is refused or evicted.
        if high_key > LOWEST:
            p_to_key += i_to * 2 * SIZE
            p_to_slot += i_to * 2 * SIZE
            to_old = _move_between(
                p_key + i_node * row,
                p_slot + i_node * row_slot,
                old + i_c * step,
                low_key,
                low_slot,
                high_key,
                high_slot,
                p_to_key,
                p_to_slot,
                p_expiry,
                False,
                LOWEST,
                MOVED,
            )
            before = old + i_c * SIZE
            to_own = _move_between(
                p_own_key + i_node * row_own + before,
                p_own_slot + i_node * row_own_slot + before,
                tl.minimum(own, SIZE),
                low_key,
                low_slot,
                high_key,
                high_slot,
                p_to_key + to_old,
                p_to_slot + to_old,
                p_expiry,
                True,
                LOWEST,
                MOVED,
            )
            # Entries of this child that die, and places still empty when it begins.
            to_keep = to_old + tl.maximum(keep - before, 0)
            if LAST and to_own > 0:
                # What other threads of this program wrote is read now.
                tl.debug_barrier()
                _expire(p_to_key, p_to_slot, to_old, to_own, to_keep, p_expiry, LOWEST, SIZE)
    if not LAST:
        tl.store(p_to_node + i_to * 3, to_old)
        tl.store(p_to_node + i_to * 3 + 1, to_own)
        tl.store(p_to_node + i_to * 3 + 2, to_keep)
