"""The cpu backend for `Lifetimes`: tiles of rows, each against the keys alive anywhere in it.

A tile's keys are gathered once per kv head, those first that all of its rows see, so that only the
few that are born or die inside the tile need a mask. The query heads of a group are stacked as
rows: one matrix product for the logits, one softmax, one product for the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynmask.masks import Lifetimes
from dynmask.ops.gather import take
from dynmask.ops.lifetimes_schedule import Runs, Tile, tiles
from dynmask.ops.reference import accumulation_dtype
from dynmask.ops.softmax import softmax_, softmax_with_lse_

# Rows that are cheaper one by one than as a tile.
_MAX_ROWS = 4
# Decode costs, in keys of one query head that a dense kernel reads in place: a key gathered for a
# kv head, the calls of a row, and a key in half precision, which that kernel reads slowly.
_GATHER = 6.0
_ROW_CALL = 25_000
_HALF = 4.0


def is_decode(q_len: int) -> bool:
    """Tell whether the rows are few enough to be run one by one."""
    return q_len <= _MAX_ROWS


def cost(q: Tensor, k: Tensor, mask: Lifetimes) -> float:
    """Return what a call costs: in pairs that a dense kernel computes; decode in keys it reads."""
    batch, heads, q_len, _ = q.shape
    groups = k.shape[1]
    if is_decode(q_len):
        keys = batch * groups * _listed(mask, q_len)
        return (_ROW_CALL * q_len + keys * _GATHER) / (_HALF if q.element_size() < 4 else 1)
    share = batch * groups / mask.expiry.shape[:2].numel()
    return share * Runs.build(mask, q_len).best(heads // groups)[1]


def computed_pairs(mask: Lifetimes, q_len: int, ratio: int) -> Tensor:
    """Return ``[B, G]`` int64: the pairs evaluated for each query head of a group.

    Args:
        mask: What each group sees.
        q_len: Query rows ``Q``, the last ones of the sequence.
        ratio: Query heads of a group; the choice of the tile depends on it.
    """
    shape = mask.expiry.shape[:2]
    if is_decode(q_len):
        return torch.full(shape, _listed(mask, q_len))
    runs = Runs.build(mask, q_len)
    return runs.pairs(runs.best(ratio)[0]).view(shape)


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Lifetimes,
    bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend row by row, all heads and sequences at once.

    Args:
        q: ``[B, H, Q, D]``, few rows.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
        mask: What each group sees.
        bias: ``[B, G, K]`` or None.
        scale: Factor of the logits.
        return_lse: Whether to compute the log-sum-exp.

    Returns:
        ``[B, H, Q, D]`` in q's dtype and ``[B, H, Q]`` in the accumulation dtype or None.
    """
    out, lse = _empty_result(q, return_lse)
    work = accumulation_dtype(q.dtype)
    q_len, (batch, groups, k_len) = q.shape[2], k.shape[:3]
    ratio = q.shape[1] // groups
    head = torch.arange(groups)
    for at in range(q_len):
        seen = _seen(mask, k_len - q_len + at)
        slots, inside = _lists(seen)
        if not slots.shape[-1]:
            continue
        row = q[:, :, at].to(work).unflatten(1, (groups, ratio)) * scale
        logits = row @ take(k, head, slots).to(work).transpose(2, 3)
        if bias is not None:
            logits += bias.gather(2, slots.expand(batch, groups, -1))[:, :, None]
        if inside is not None:
            logits.masked_fill_(~inside[:, :, None], -torch.inf)
        if lse is not None or bias is not None or inside is not None:
            part_lse = softmax_with_lse_(logits)
            if lse is not None:
                lse[:, :, at] = part_lse.flatten(1, 2)
        else:
            softmax_(logits)
        part = logits @ take(v, head, slots).to(work)
        if inside is not None:
            # A group without keys was given a key that it does not see.
            part.masked_fill_(~inside[:, :, None, :1], 0)
        out[:, :, at] = part.flatten(1, 2)
    return out, lse


def _seen(mask: Lifetimes, slot: int) -> Tensor:
    """Return ``[B, G, slot + 1]`` bool: the keys that the row at ``slot`` sees."""
    return mask.expiry[..., : slot + 1] > slot


def _listed(mask: Lifetimes, q_len: int) -> int:
    """Count the keys that decode gathers per group: as many as the group with most."""
    first = mask.expiry.shape[2] - q_len
    return sum(int(_seen(mask, first + at).sum(-1).max()) for at in range(q_len))


def _lists(seen: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the keys seen as ``[B, G, most]`` slots, and which entries count; None for all.

    Lists shorter than the longest repeat their first key, so that no hidden value enters by
    0 * inf.
    """
    shape = seen.shape[:2]
    owner, slot = seen.flatten(0, 1).nonzero(as_tuple=True)
    count = torch.bincount(owner, minlength=shape.numel())
    most = int(count.max())
    if len(slot) == most * len(count):
        return slot.view(*shape, most), None
    start = (count.cumsum(0) - count)[:, None]
    place = torch.arange(most)
    inside = place < count[:, None]
    at = torch.where(inside, start + place, start).clamp_max(len(slot) - 1)
    return slot[at].view(*shape, most), inside.view(*shape, most)


def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Lifetimes,
    bias: Tensor | None,
    scale: float,
    return_lse: bool,
    *,
    finite: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend tile by tile and kv head by kv head.

    Args:
        q: ``[B, H, Q, D]``.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
        mask: What each group sees.
        bias: ``[B, G, K]`` or None.
        scale: Factor of the logits.
        return_lse: Whether to compute the log-sum-exp.
        finite: Whether all of ``k`` and ``v`` are finite numbers; slower if not.

    Returns:
        ``[B, H, Q, D]`` in q's dtype and ``[B, H, Q]`` in the accumulation dtype or None.
    """
    out, lse = _empty_result(q, return_lse)
    work = accumulation_dtype(q.dtype)
    q_len, (batch, groups) = q.shape[2], k.shape[:2]
    mask_batch, mask_groups = mask.expiry.shape[:2]
    ratio, dim = q.shape[1] // groups, q.shape[3]
    runs = Runs.build(mask, q_len)
    size, _ = runs.best(ratio)
    hollow = runs.hollow(size)
    stacked = [t.unflatten(1, (groups, ratio)) for t in (q, out)]
    stacked_lse = None if lse is None else lse.unflatten(1, (groups, ratio))
    # One memory for all tiles: fresh one costs as much as the arithmetic.
    rows_memory, out_memory = q.new_empty(2, ratio * size * dim, dtype=work)
    logits_memory = q.new_empty(ratio * size * int(runs.counts(size).max()), dtype=work)
    for tile in tiles(runs, size, work):
        span, count = slice(tile.top, tile.last), tile.last - tile.top
        rows = rows_memory[: ratio * count * dim].view(ratio, count, dim)
        part = out_memory[: ratio * count * dim].view(ratio * count, dim)
        logits = logits_memory[: ratio * count * len(tile.slots)].view(ratio * count, -1)
        exact = return_lse or bias is not None or hollow[tile.owner][tile.top // size]
        own_batch, own_group = divmod(tile.owner, mask_groups)
        for b in range(batch) if mask_batch == 1 else (own_batch,):
            for g in range(groups) if mask_groups == 1 else (own_group,):
                keys = k[b, g].index_select(0, tile.slots).to(work)
                values = v[b, g].index_select(0, tile.slots).to(work)
                torch.mul(stacked[0][b, g, :, span].to(work), scale, out=rows)
                torch.mm(rows.flatten(0, 1), keys.T, out=logits)
                if bias is not None:
                    logits += bias[b, g].index_select(0, tile.slots)
                hide(logits, tile, finite=finite)
                if exact:
                    part_lse = softmax_with_lse_(logits)
                    if stacked_lse is not None:
                        stacked_lse[b, g, :, span] = part_lse.view(ratio, count)
                else:
                    softmax_(logits)
                torch.mm(logits, values if finite else values.nan_to_num(0, 0, 0), out=part)
                if not finite:
                    _show_not_finite(part, values, tile)
                stacked[1][b, g, :, span] = part.view(ratio, count, dim)
    return out, lse


def hide(logits: Tensor, tile: Tile, *, finite: bool = True) -> None:
    """Set ``[r * rows, U]`` logits to -inf where the row does not see the key.

    Args:
        logits: Of the tile's rows, stacked, and its keys.
        tile: Which they are.
        finite: Whether no logit is NaN; slower if not.
    """
    if tile.whole == logits.shape[1]:
        return
    edge = logits.view(-1, *tile.fence.shape[:1], logits.shape[1])[..., tile.whole :]
    if finite:
        torch.minimum(edge, tile.fence, out=edge)
    else:
        # The minimum of NaN and -inf is NaN.
        edge.masked_fill_(tile.fence < 0, -torch.inf)


def _show_not_finite(out: Tensor, values: Tensor, tile: Tile) -> None:
    """Set ``out [r * rows, D]`` to NaN where the row sees a value that is not finite."""
    unknown = (~values.isfinite()).to(values.dtype)
    shown = (tile.fence > 0).to(values.dtype) @ unknown[tile.whole :] + unknown[: tile.whole].sum(0)
    out.view(-1, *shown.shape).masked_fill_(shown > 0, torch.nan)


def _empty_result(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Return the output of rows that see no key, to be filled."""
    lse = None
    if return_lse:
        lse = torch.full(q.shape[:3], -torch.inf, dtype=accumulation_dtype(q.dtype))
    return torch.zeros(q.shape, dtype=q.dtype), lse
