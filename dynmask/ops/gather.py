"""Decode for the cpu backend: each head gathers the few keys that its newest rows see."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmask.masks import Stripes
from dynmask.ops.reference import accumulation_dtype
from dynmask.ops.softmax import softmax_with_lse_

# Rows that are cheaper one by one than as a tile.
_MAX_ROWS = 4
# A gathered key costs about this many keys read in place, and a row's calls about as much as
# reading so many keys. Measured by benchmarks/stripes_cpu.py.
_GATHER = 4.0
_CALL = 40_000
_NEVER = torch.iinfo(torch.int64).max


def fits(mask: Stripes, q_len: int, k_len: int) -> bool:
    """Tell whether a call is decode: few rows, and none that the corner reaches."""
    if q_len > _MAX_ROWS:
        return False
    if mask.corner is None:
        return True
    start = 0 if mask.padding is None else int(mask.padding.start.max())
    return k_len - q_len - start >= mask.corner.shape[1]


def pays(mask: Stripes, batch: int, q_len: int, k_len: int) -> bool:
    """Tell whether gathering costs less than a dense kernel that reads every key."""
    striped = mask.heads - int(mask.full_heads.sum())
    width = sum(table.shape[1] for table in _tables(mask, k_len - 1))
    rows = batch * q_len * striped
    return q_len * _CALL + rows * width * _GATHER < rows * k_len


def computed_pairs(mask: Stripes, q_len: int, k_len: int) -> Tensor:
    """Return ``[B, H]`` int64: keys gathered for ``q_len`` rows; full heads count causal pairs."""
    columns, offsets = _tables(mask, k_len - 1)
    pairs = torch.full((mask.heads,), q_len * (columns.shape[1] + offsets.shape[1]))
    pairs[mask.full_heads.cpu()] = q_len * k_len - q_len * (q_len - 1) // 2
    batch = 1 if mask.padding is None else len(mask.padding.start)
    return pairs.expand(batch, -1).clone()


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Stripes, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend row by row.

    Args:
        q: ``[B, H, Q, D]``, few rows.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
        mask: What each head sees.
        bias: ``[B, G, K]`` or None.
        scale: Factor of the logits.

    Returns:
        ``[B, H, Q, D]`` in q's dtype and ``[B, H, Q]`` in the accumulation dtype.
    """
    work = accumulation_dtype(q.dtype)
    batch, _, q_len, _ = q.shape
    k_len = k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:3], dtype=work)
    start = torch.zeros(batch, dtype=torch.int64)
    stop = torch.full_like(start, k_len)
    if mask.padding is not None:
        start, stop = mask.padding.start, mask.padding.stop
    striped = (~mask.full_heads).nonzero().flatten()
    for at in range(q_len):
        slot = k_len - q_len + at
        live = (start <= slot) & (slot < stop)
        row = q[:, :, at].to(work) * scale
        if len(striped):
            keys, seen = _visible(mask, striped, slot - start)
            slots = (keys + start[:, None, None]).clamp(0, k_len - 1)
            seen &= live[:, None, None]
            out[:, striped, at], lse[:, striped, at] = _gathered(
                row[:, striped], k, v, bias, slots, seen, striped // (q.shape[1] // k.shape[1])
            )
        if len(striped) < mask.heads:
            _full_heads(row, k, v, bias, mask, start, live, slot, out[:, :, at], lse[:, :, at])
    return out, lse


def _tables(mask: Stripes, last: int) -> tuple[Tensor, Tensor]:
    """Return ``[H, C]`` columns and ``[H, R]`` offsets up to ``last``, padded by a huge number."""
    if "tables" not in mask.derived:
        mask.derived["tables"] = (_pad(mask.columns, mask), _pad(mask.offsets, mask))
    columns, offsets = mask.derived["tables"]
    return _cut(columns, last), _cut(offsets, last)


def _pad(positions: tuple[Tensor, ...], mask: Stripes) -> Tensor:
    used = [p.new_empty(0) if f else p for p, f in zip(positions, mask.full_heads, strict=True)]
    # At least one column, so that a search in the table always has something to compare with.
    table = torch.full((mask.heads, max(1, *map(len, used))), _NEVER)
    for head, p in enumerate(used):
        table[head, : len(p)] = p.cpu()
    return table


def _cut(table: Tensor, last: int) -> Tensor:
    used = int((table <= last).sum(1).max())
    return table[:, : max(1, used)]


def _visible(mask: Stripes, heads: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions and visibility ``[B, heads, C + R]`` for rows at positions ``row [B]``."""
    columns, offsets = _tables(mask, max(0, int(row.max())))
    columns, offsets = columns[heads], offsets[heads]
    row = row[:, None, None]
    near = row - offsets
    batch = len(row)
    # A key that is a column already is not gathered again as an offset.
    wanted = near.transpose(0, 1).reshape(len(heads), -1).contiguous()
    found = torch.searchsorted(columns, wanted).clamp_max(columns.shape[1] - 1)
    taken = (columns.gather(1, found) == wanted).view(len(heads), batch, -1).transpose(0, 1)
    seen = torch.cat([(columns <= row).expand(batch, -1, -1), (near >= 0) & ~taken], -1)
    positions = torch.cat([columns.expand(batch, -1, -1), near], -1)
    return positions.masked_fill(~seen, 0), seen


def _gathered(
    row: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    seen: Tensor,
    groups: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attend ``row [B, heads, D]`` to the keys at ``slots [B, heads, n]``."""
    logits = (_take(k, groups, slots).to(row.dtype) @ row[..., None])[..., 0]
    if bias is not None:
        logits += bias[torch.arange(len(row))[:, None, None], groups[:, None], slots]
    lse = softmax_with_lse_(logits.masked_fill_(~seen, float("-inf")))
    out = logits[..., None, :] @ _take(v, groups, slots).to(row.dtype)
    return out[..., 0, :].to(k.dtype), lse


def _take(source: Tensor, groups: Tensor, slots: Tensor) -> Tensor:
    """Return ``source[b, groups[h], slots[b, h, n]]`` as ``[B, heads, n, D]``.

    Whole rows are copied, many times faster than by indexing in three dimensions; the cache's
    memory is read as one list of rows, whatever the order of its dimensions.
    """
    batch, _, _, dim = source.shape
    if source.stride(3) != 1 or any(s % dim for s in source.stride()[:3]):
        source = source.contiguous()
    sizes = [s // dim for s in source.stride()[:3]]
    count = 1 + sum((n - 1) * s for n, s in zip(source.shape[:3], sizes, strict=True))
    rows = source.as_strided((count, dim), (dim, 1))
    head = torch.arange(batch)[:, None] * sizes[0] + groups * sizes[1]
    index = slots * sizes[2] + head[..., None]
    return rows.index_select(0, index.flatten()).view(*index.shape, dim)


def _full_heads(
    row: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Stripes,
    start: Tensor,
    live: Tensor,
    slot: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Attend the full heads, group by group: their keys are read in place, not copied."""
    ratio = mask.heads // k.shape[1]
    place = torch.arange(slot + 1)
    seen = (place >= start[:, None]) & live[:, None]
    for group in range(k.shape[1]):
        heads = mask.full_heads[group * ratio : (group + 1) * ratio].nonzero().flatten()
        if not len(heads):
            continue
        heads = heads + group * ratio
        logits = row[:, heads] @ k[:, group, : slot + 1].to(row.dtype).transpose(1, 2)
        if bias is not None:
            logits += bias[:, group, None, : slot + 1]
        lse[:, heads] = softmax_with_lse_(logits.masked_fill_(~seen[:, None], float("-inf")))
        out[:, heads] = (logits @ v[:, group, : slot + 1].to(row.dtype)).to(out.dtype)
