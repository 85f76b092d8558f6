"""Decode for the cpu backend: each head gathers the few keys that its newest rows see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmask.masks import Stripes
from dynmask.ops.reference import accumulation_dtype
from dynmask.ops.softmax import softmax_, softmax_with_lse_

# Rows that are cheaper one by one than as a tile.
_MAX_ROWS = 4
# Costs in keys of one head that torch's kernel reads in place: a gathered key, the calls of a row,
# the calls of a full head (of each sequence, where they start apart), and a key in half precision,
# which that kernel reads slowly.
_GATHER = 4.0
_CALL = 25_000
_FULL_CALL = 8_000
_HALF = 4.0


@dataclass(frozen=True, eq=False)
class _Stencil:
    """The keys of a row, as far as they do not depend on the row; striped heads only.

    Attributes:
        heads: ``[S]`` int64, the heads that are not full.
        base: ``[S, C + R]`` int64: a column ``c`` as ``c``, an offset ``r`` as ``-r``; heads with
            fewer are filled up with 0.
        used: ``[S, C + R]`` bool, False where filled up.
        columns: ``C``, how many of the width are columns.
        is_column: ``[S, last column + 1]`` bool.
        settled: First row that has every column before it, reaches back by every offset, and meets
            no column by an offset: from here on a row sees ``used``.
    """

    heads: Tensor
    base: Tensor
    used: Tensor
    columns: int
    is_column: Tensor
    settled: int

    @classmethod
    def build(cls, mask: Stripes) -> _Stencil:
        heads = (~mask.full_heads).nonzero().flatten()
        columns = [mask.columns[h] for h in heads.tolist()]
        offsets = [mask.offsets[h] for h in heads.tolist()]
        count, reach = max(map(len, columns)), max(map(len, offsets))
        last = max((int(c[-1]) for c in columns if len(c)), default=-1)
        base = torch.zeros(len(heads), count + reach, dtype=torch.int64)
        used = torch.zeros(base.shape, dtype=torch.bool)
        is_column = torch.zeros(len(heads), last + 1, dtype=torch.bool)
        for at, (c, r) in enumerate(zip(columns, offsets, strict=True)):
            base[at, : len(c)] = c
            base[at, count : count + len(r)] = -r
            used[at, : len(c)] = True
            used[at, count : count + len(r)] = True
            is_column[at, c] = True
        settled = last + 1 + max(int(r[-1]) for r in offsets)
        return cls(heads, base, used, count, is_column, settled)

    def keys(self, slot: int, starts: list[int]) -> tuple[Tensor, Tensor | None]:
        """Return the key slots ``[B or 1, S, C + R]`` of one row, and which of them it sees.

        Args:
            slot: The row's key slot.
            starts: Each sequence's first slot, 0 to ``slot``; one where all are alike.

        Returns:
            Slots, the row's own where it sees none; and bool of that shape, None for all.
        """
        start = torch.tensor(starts)[:, None, None]
        slots = self.base.repeat(len(starts), 1, 1)
        slots[..., : self.columns] += start
        slots[..., self.columns :] += slot
        if slot - max(starts) >= self.settled:
            if bool(self.used.all()):
                return slots, None
            seen = self.used.expand(slots.shape)
        else:
            seen = self.used & (slots >= start) & (slots <= slot)
            if self.columns:
                # A key that is a column already is not gathered again as an offset.
                near = slots[..., self.columns :] - start
                inside = (near >= 0) & (near < self.is_column.shape[1])
                places = near.clamp(0, self.is_column.shape[1] - 1)
                taken = self.is_column.expand(len(starts), -1, -1).gather(2, places) & inside
                seen[..., self.columns :] &= ~taken
        # The own slot, which the row does see, so that no hidden value enters by 0 * inf.
        return slots.masked_fill_(~seen, slot), seen


def fits(mask: Stripes, q_len: int, k_len: int) -> bool:
    """Tell whether a call is decode: few rows, and none that the corner reaches."""
    if q_len > _MAX_ROWS:
        return False
    if mask.corner is None:
        return True
    start = 0
    if mask.padding is not None:
        start = max((start for start, _ in mask.padding.runs(k_len)), default=0)
    return k_len - q_len - start >= mask.corner.shape[1]


def pays(q: Tensor, k: Tensor, mask: Stripes) -> bool:
    """Tell whether gathering costs less than a dense kernel that reads every key."""
    stencil = _stencil(mask)
    if stencil is None:
        return False
    batch, heads = q.shape[:2]
    parts = 1 if mask.padding is None else batch
    striped = len(stencil.heads)
    calls = _CALL + (heads - striped) * parts * _FULL_CALL
    gathered = batch * striped * stencil.base.shape[1] * _GATHER
    key = _HALF if q.element_size() < 4 else 1.0
    return calls + gathered < batch * striped * k.shape[2] * key


def computed_pairs(mask: Stripes, q_len: int, k_len: int) -> Tensor:
    """Return ``[B, H]`` int64: keys gathered for ``q_len`` rows; full heads count causal pairs."""
    pairs = torch.full((mask.heads,), q_len * k_len - q_len * (q_len - 1) // 2)
    stencil = _stencil(mask)
    if stencil is not None:
        pairs[stencil.heads] = q_len * stencil.base.shape[1]
    batch = 1 if mask.padding is None else len(mask.padding.start)
    return pairs.expand(batch, -1).clone()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Stripes,
    bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend row by row, all heads and sequences at once.

    Args:
        q: ``[B, H, Q, D]``, few rows.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
        mask: What each head sees.
        bias: ``[B, G, K]`` or None.
        scale: Factor of the logits.
        return_lse: Whether to compute the log-sum-exp.

    Returns:
        ``[B, H, Q, D]`` in q's dtype and ``[B, H, Q]`` in the accumulation dtype or None.
    """
    work = accumulation_dtype(q.dtype)
    heads, q_len = q.shape[1:3]
    k_len = k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:3], dtype=work) if return_lse else None
    runs = [(0, k_len)] if mask.padding is None else mask.padding.runs(k_len)
    stencil = _stencil(mask)
    for at in range(q_len):
        slot = k_len - q_len + at
        # A row of padding is computed as the only token of its sequence, and dropped after.
        dead = [not start <= slot < stop for start, stop in runs]
        starts = [slot if d else start for d, (start, _) in zip(dead, runs, strict=True)]
        if len(set(starts)) == 1:
            starts = starts[:1]
        row = q[:, :, at].to(work) * scale
        if stencil is not None:
            chosen = slice(None) if len(stencil.heads) == heads else stencil.heads
            slots, seen = stencil.keys(slot, starts)
            groups = stencil.heads // (heads // k.shape[1])
            part, part_lse = _gathered(row[:, chosen], k, v, bias, slots, seen, groups, return_lse)
            out[:, chosen, at] = part.to(q.dtype)
            if lse is not None and part_lse is not None:
                lse[:, chosen, at] = part_lse
        if stencil is None or len(stencil.heads) < heads:
            _full_heads(
                row,
                k,
                v,
                bias,
                mask,
                slot,
                starts,
                out[:, :, at],
                None if lse is None else lse[:, :, at],
            )
        if any(dead):
            out[torch.tensor(dead), :, at] = 0
            if lse is not None:
                lse[torch.tensor(dead), :, at] = float("-inf")
    return out, lse


def _stencil(mask: Stripes) -> _Stencil | None:
    """Return the mask's stencil, built once; None if every head is full."""
    if mask.all_full:
        return None
    if "stencil" not in mask.derived:
        mask.derived["stencil"] = _Stencil.build(mask)
    stencil: _Stencil = mask.derived["stencil"]
    return stencil


def _weights(logits: Tensor, seen: Tensor | None, exact: bool) -> Tensor | None:
    """Turn logits into weights in place; ``exact``: rows may be empty, or the lse is wanted."""
    if seen is not None:
        logits.masked_fill_(~seen, float("-inf"))
    if exact:
        return softmax_with_lse_(logits)
    softmax_(logits)
    return None


def _gathered(
    row: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    seen: Tensor | None,
    groups: Tensor,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend ``row [B, S, D]`` to the keys at ``slots [B or 1, S, n]``."""
    logits = (take(k, groups, slots).to(row.dtype) @ row[..., None])[..., 0]
    if bias is not None:
        logits += bias[torch.arange(len(row))[:, None, None], groups[:, None], slots]
    lse = _weights(logits, seen, return_lse or bias is not None)
    out = logits[..., None, :] @ take(v, groups, slots).to(row.dtype)
    return out[..., 0, :], lse


def take(source: Tensor, groups: Tensor, slots: Tensor) -> Tensor:
    """Return ``source[b, groups[h], slots[b or 0, h, n]]`` as ``[B, S, n, D]``.

    ``groups`` is ``[S]``, ``slots`` ``[B or 1, S or 1, n]``. Whole rows are copied, many times
    faster than by indexing in three dimensions; the cache's memory is read as one list of rows,
    whatever the order of its dimensions.
    """
    batch, _, _, dim = source.shape
    if source.stride(3) != 1 or any(s % dim for s in source.stride()[:3]):
        source = source.contiguous()
    sizes = [s // dim for s in source.stride()[:3]]
    count = 1 + sum((n - 1) * s for n, s in zip(source.shape[:3], sizes, strict=True))
    rows = source.as_strided((count, dim), (dim, 1))
    head = torch.arange(batch)[:, None] * sizes[0] + groups * sizes[1]
    index = torch.add(head[..., None], slots, alpha=sizes[2])
    return rows.index_select(0, index.flatten()).view(*index.shape, dim)


def _full_heads(
    row: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Stripes,
    slot: int,
    starts: list[int],
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Attend the full heads, group by group: their keys are read in place, not copied."""
    ratio = mask.heads // k.shape[1]
    full = mask.full_heads.tolist()
    # Sequences that start alike run together; the others one by one, so that none reads padding.
    parts = [slice(None)] if len(starts) == 1 else [slice(b, b + 1) for b in range(len(starts))]
    for group in range(k.shape[1]):
        heads = [h for h in range(group * ratio, (group + 1) * ratio) if full[h]]
        if not heads:
            continue
        for b, start in zip(parts, starts, strict=True):
            place = slice(start, slot + 1)
            logits = row[b, heads] @ k[b, group, place].to(row.dtype).transpose(1, 2)
            if bias is not None:
                logits += bias[b, group, None, place]
            part_lse = _weights(logits, None, lse is not None or bias is not None)
            out[b, heads] = (logits @ v[b, group, place].to(row.dtype)).to(out.dtype)
            if lse is not None and part_lse is not None:
                lse[b, heads] = part_lse
