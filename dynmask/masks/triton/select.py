"""Exact causal top-w on the GPU: when each key is evicted.

A *node* is a stretch of the causal scan. Its list holds, in order of slots, the keys that matter in
it: the kept ones that die there (``old``) and those born there that the set kept at its beginning
does not refuse (``own``, at most ``P``). Every own key takes a place, so there are no more old keys
than own ones. All other kept keys outlive the node, so its problem is the whole one again: a key
expires where the ``keep``-th entry of the list that beats it stands, with ``keep`` the number of
old entries plus the places still empty when the node begins.

The root is the whole scan, with nothing old and all keys own. Each level cuts the own entries of
its nodes into children of ``P`` entries: `worst_kernel` finds the worst kept entry at the end of
each child, `split_kernel` lists what the worst one of its beginning does not beat and, of the old
entries, what the worst one of its end beats. At the last level it compares all entries of a child
with each other, ``4 P`` comparisons a key at most. With random scores nearly all keys are refused
at the first level; when every key is kept for a while, every level has work to do.

In a long scan the prefixes that the first level would look at are long. There `best_kernel` lists
the best ``keep`` keys of each chunk, and the kept keys of a prefix are found among these.

If only rows from some offset on are asked for, the root begins there: the keys kept at the offset
are its old ones, the others before it matter no more. `select_prefix` finds them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dynmask.masks.lifetimes import NEVER
from dynmask.masks.triton.library import fake, operator
from dynmask.masks.triton.select_kernels import (
    best_kernel,
    encode_kernel,
    split_kernel,
    worst_kernel,
)
from dynmask.masks.triton.select_lists import Lists
from dynmask.masks.triton.select_prefix import BLOCKS, kept_and_own, prefix_of


@dataclass(frozen=True)
class Level:
    """How one level is cut and run.

    Args:
        size: ``P``, own entries of a child; a power of two, at least 8.
        block: Entries that a program counts in one step, the first ones held in registers; a
            power of two, at least 8.
        warps: Warps of a program.
    """

    size: int
    block: int
    warps: int


@dataclass(frozen=True)
class Plan:
    """The levels of a selection, from coarse to fine.

    Args:
        levels: At least one.
        best: Whether the first level looks at the best keys of each chunk in place of all keys;
            then ``keep`` is at most its size.
        blocks: What `select_prefix` takes its steps from, ascending powers of two.
    """

    levels: tuple[Level, ...]
    best: bool = False
    blocks: tuple[int, ...] = BLOCKS


_ENCODED = 1024
_MIDDLE = Level(size=2048, block=4096, warps=16)
_FINE = Level(size=128, block=2048, warps=4)


def plan_of(count: int, keep: int) -> Plan:
    """Choose the levels for ``count`` rows that keep ``keep`` keys each."""
    if count <= 2**14:
        return Plan((Level(size=128, block=4096, warps=8),))
    if count <= 2**16:
        return Plan((_MIDDLE, _FINE))
    chunk = 2**15 if keep <= 2**13 else 2**16
    coarse = Level(size=chunk, block=8192, warps=32)
    return Plan((coarse, _MIDDLE, _FINE), best=2 * keep <= chunk)


@operator("lifetimes_top")
def expiry_of_top(
    score: Tensor, keep: int, segment: Tensor | None = None, offset: int = 0
) -> Tensor:
    """Return when each key leaves the causal top ``keep``, exactly.

    ``expiry_j = max(j, the keep-th smallest slot among the keys that beat j)``, and `NEVER` if
    fewer than ``keep`` keys beat it. Key ``x`` beats key ``y`` if it has the higher segment, or the
    same and the higher score, or both the same and the earlier slot. Scores are compared in
    float32; NaN counts as -inf, -0.0 equals 0.0.

    Rows before ``offset`` do not count: a key that no later row sees may get its own slot instead.
    For the last row alone this is one launch up to 32K keys, two up to 512K with ``keep`` 2048.

    Nothing waits for the device. Scratch memory: about 40 bytes a score, 60 with segments.

    Args:
        score: ``[B, G, K]`` float, any strides.
        keep: ``w``, at least 1.
        segment: ``[B, K]`` int32, any values; None means one segment.
        offset: First row that counts, at most ``K``.

    Returns:
        ``[B, G, K]`` int32, contiguous.
    """
    count = score.shape[-1]
    prefix = prefix_of(offset, count, keep, segmented=segment is not None)
    return run_plan(score, keep, segment, plan_of(count - prefix, keep), prefix)


@fake("lifetimes_top")
def _(score: Tensor, keep: int, segment: Tensor | None = None, offset: int = 0) -> Tensor:
    return score.new_empty(score.shape, dtype=torch.int32)


def run_plan(
    score: Tensor, keep: int, segment: Tensor | None, plan: Plan, prefix: int = 0
) -> Tensor:
    """Run `expiry_of_top` with the given levels, on which its speed depends alone.

    What the first ``prefix`` keys do to each other is left out.
    """
    batch, groups, count = score.shape
    expiry = torch.empty(batch, groups, count, dtype=torch.int32, device=score.device)
    if expiry.numel() == 0 or count <= keep:
        return expiry.fill_(NEVER)
    with torch.cuda.device_of(score):
        if prefix == 0:
            own, node = _root(score, keep, segment, expiry)
        else:
            own, node = kept_and_own(
                score, keep, segment, expiry, prefix=prefix, blocks=plan.blocks
            )
        if prefix == count:
            return expiry
        nodes, parent = 1, count - prefix
        for depth, level in enumerate(plan.levels):
            children = triton.cdiv(parent, level.size)
            kept, step = own, level.size
            if plan.best and depth == 0:
                kept, step = _best(own, keep, min(keep, prefix), parent, children, level), keep
            last = depth == len(plan.levels) - 1
            own, node = _children(
                kept,
                own,
                node,
                expiry,
                nodes=nodes,
                children=children,
                step=step,
                level=level,
                last=last,
            )
            nodes, parent = nodes * children, level.size
    return expiry


def _root(score: Tensor, keep: int, segment: Tensor | None, expiry: Tensor) -> tuple[Lists, Tensor]:
    """Return all keys of each head and the node that holds them; fill ``expiry`` with `NEVER`."""
    batch, groups, count = score.shape
    kind = torch.int32 if segment is None else torch.int64
    row = triton.cdiv(count, 16) * 16
    key = torch.empty(batch * groups, row, dtype=kind, device=score.device)
    slot = torch.empty(row, dtype=torch.int32, device=score.device).expand(batch * groups, row)
    node = torch.empty(batch * groups, 3, dtype=torch.int32, device=score.device)
    blocks = triton.cdiv(count, _ENCODED)
    encode_kernel[(batch * groups * blocks,)](
        score,
        segment,
        key,
        slot,
        expiry,
        node,
        count,
        keep,
        groups,
        blocks,
        row,
        *score.stride(),
        *((0, 0) if segment is None else segment.stride()),
        SEGMENTS=segment is not None,
        NEVER=NEVER,
        BLOCK=_ENCODED,
    )
    return Lists(key, slot), node


def _best(own: Lists, keep: int, old: int, count: int, chunks: int, level: Level) -> Lists:
    """Return the old keys and the best ``keep`` of every chunk, or all it has, as one list a head.

    Args:
        own: One list a head: ``old`` keys, then ``count`` that are cut into chunks.
        keep: Keys a row keeps.
        old: Keys kept before the first chunk.
        count: Keys in all chunks.
        chunks: Chunks a head.
        level: Its size is a chunk's.
    """
    best = Lists.empty(len(own.key), old + chunks * keep, like=own.key)
    if old:
        best.key[:, :old] = own.key[:, :old]
        best.slot[:, :old] = own.slot[:, :old]
    best_kernel[(len(own.key) * chunks,)](
        *own,
        *best,
        chunks,
        count,
        keep,
        old,
        *own.strides,
        best.key.stride(0),
        SIZE=level.size,
        MOVED=level.block // 4,
        **_counting(own, level),
    )
    return best


def _children(
    kept: Lists,
    own: Lists,
    node: Tensor,
    expiry: Tensor,
    *,
    nodes: int,
    children: int,
    step: int,
    level: Level,
    last: bool,
) -> tuple[Lists, Tensor]:
    """Return the lists of the children and what they hold; at the last level, fill ``expiry``.

    Args:
        kept: What the keys kept at a child's beginning are found among.
        own: The lists of the nodes.
        node: ``[L, 3]`` int32: old and own entries of each node, and its ``keep``.
        expiry: ``[B, G, K]`` int32.
        nodes: Nodes a head.
        children: Children a node.
        step: Entries of ``kept`` a child.
        level: How the nodes are cut.
        last: Whether this is the last level.
    """
    programs = len(node) * children
    worst = own.key.new_empty(programs), node.new_empty(programs)
    worst_kernel[(programs,)](
        *kept,
        node,
        *worst,
        children,
        *kept.strides,
        step,
        SIZE=level.size,
        **_counting(own, level),
    )
    made = Lists.empty(programs, 2 * level.size, like=own.key)
    made_node = node.new_empty(programs, 3)
    split_kernel[(programs,)](
        *kept,
        *own,
        node,
        *worst,
        *made,
        made_node,
        expiry,
        children,
        nodes,
        expiry.shape[-1],
        *kept.strides,
        *own.strides,
        step,
        SIZE=level.size,
        LAST=last,
        LOWEST=torch.iinfo(own.key.dtype).min,
        MOVED=level.block // 4,
        num_warps=level.warps,
    )
    return made, made_node


def _counting(lists: Lists, level: Level) -> dict[str, int]:
    """Options of the kernels that hold a block of keys in registers: 64 bits take two."""
    kind = torch.iinfo(lists.key.dtype)
    block = level.block * 32 // kind.bits
    return {"LOWEST": kind.min, "BLOCK": block, "num_warps": level.warps}
