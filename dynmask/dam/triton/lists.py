# mypy: disable-error-code="no-untyped-def"
"""Which slots each tile of query rows gathers under a dynamic choice, straight from the choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from dynmask.masks.triton.schedule import TileLists

if TYPE_CHECKING:
    from dynmask.dam.dynamic_keys import Keys
    from dynmask.dam.dynamic_select import Choice

# Entries that one program may write for far blocks.
_CELLS = 4096
_BLOCK = 1024


def choice_lists(choice: Choice, keys: Keys, last: int) -> TileLists:
    """List the slots that each tile of a choice sees, of ``keys`` up to position ``last``.

    The slots are those of `Choice.blocks`, in tiles of ``choice.tile`` slots, for a call whose rows
    end at position ``last - 1`` and whose keys are the first ``keys.summaries + last`` slots: as of
    `dynmask.masks.triton.block_lists`, where no padding is. Full are, block by block, the summary
    of a far block or all its keys, and then the keys from the last far block up to the tile's first
    slot; partial are the tile's later slots, ascending too. In one kernel, without waiting for the
    device. A tile's list is as long as its last position at most, so ``last`` long for all.

    Args:
        choice: For the tiles of rows up to ``last - 1``, from the first row's tile on; where in
            that tile the rows begin does not matter.
        keys: Of the whole sequence, with summaries.
        last: Position behind the last row.
    """
    batch, groups, tiles, count = choice.kept.shape
    assert tiles == triton.cdiv(last, choice.tile) - choice.top, (tiles, choice.top, last)
    device = choice.kept.device
    slots = torch.empty(batch, groups, tiles, last, dtype=torch.int32, device=device)
    full = torch.empty(batch, groups, tiles, dtype=torch.int32, device=device)
    partial = torch.empty_like(full)
    block_j = triton.next_power_of_2(choice.block)
    chunk = max(_CELLS // block_j, 1)
    if full.numel():
        with torch.cuda.device_of(slots):
            _list_kernel[(tiles, 1 + triton.cdiv(count, chunk), batch * groups)](
                choice.kept.contiguous().view(torch.int8),
                choice.far,
                slots,
                full,
                partial,
                tiles,
                count,
                keys.summaries,
                choice.top,
                last,
                choice.tile,
                choice.block,
                BLOCK_J=block_j,
                CHUNK=chunk,
                BLOCK=_BLOCK,
                num_warps=4,
            )
    return TileLists(slots, full, partial)


@triton.jit(do_not_specialize=["T", "N", "summaries", "top", "last"])
def _list_kernel(
    p_kept,
    p_far,
    p_slots,
    p_full,
    p_partial,
    T,
    N,
    summaries,
    top,
    last,
    tile,
    block,
    BLOCK_J: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one part of a tile's list: what is near, in part 0, or a chunk of far blocks."""
    i_t = tl.program_id(0)
    i_part = tl.program_id(1)
    i_list = tl.program_id(2).to(tl.int64) * T + i_t
    p_kept += i_list * N
    p_slots += i_list * last
    far = tl.load(p_far + i_t).to(tl.int32)
    begin = tl.where(i_part == 0, far, (i_part - 1) * CHUNK)
    if (i_part == 0) | (begin < far):
        o = tl.arange(0, BLOCK)
        # No part waits for another: each counts for itself what stands before it.
        b_count = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(0, begin, BLOCK):
            b_count += tl.load(p_kept + start + o, mask=start + o < begin, other=0).to(tl.int32)
        n = begin + tl.sum(b_count, 0) * (block - 1)
        if i_part == 0:
            a = (top + i_t) * tile
            b = tl.minimum(a + tile, last)
            near = far * block
            for start in range(near, b, BLOCK):
                o_j = start + o
                # Full ones follow the far blocks, partial ones end where the list does.
                place = tl.where(o_j <= a, n + o_j - near, last - b + o_j)
                tl.store(p_slots + place, summaries + o_j, mask=o_j < b)
            tl.store(p_full + i_list, n + a + 1 - near)
            tl.store(p_partial + i_list, b - a - 1)
        else:
            o_n = begin + tl.arange(0, CHUNK)
            m_n = o_n < far
            b_kept = tl.load(p_kept + o_n, mask=m_n, other=0).to(tl.int32)
            b_width = 1 + b_kept * (block - 1)
            b_place = n + tl.cumsum(b_width, 0) - b_width
            tl.store(p_slots + b_place, o_n, mask=m_n & (b_kept == 0))
            if tl.sum(b_kept, 0) > 0:
                o_j = tl.arange(0, BLOCK_J)
                tl.store(
                    p_slots + b_place[:, None] + o_j[None, :],
                    summaries + o_n[:, None] * block + o_j[None, :],
                    mask=(b_kept > 0)[:, None] & (o_j < block)[None, :],
                )
