"""Rows of a mask as a bool matrix, for kernels that take one: fast, a block at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmask.masks import Mask, Stripes


def causal_rows(first: int, last: int, k_len: int, device: torch.device) -> Tensor:
    """Return ``[1, 1, last - first, k_len]`` bool: plain causal rows at slots first to last - 1."""
    row = torch.arange(first, last, device=device)[:, None]
    return (torch.arange(k_len, device=device) <= row)[None, None]


def per_query_head(seen: Tensor, heads: int) -> Tensor:
    """Return ``[B, H or 1, ..]`` of ``[B, G, ..]``, kv head ``h // (H / G)`` for query head ``h``.

    One kv head is left to broadcast, and ``H`` heads are returned as they are.
    """
    groups = seen.shape[1]
    return seen if groups in (1, heads) else seen.repeat_interleave(heads // groups, 1)


def dense_rows(mask: Mask, first: int, last: int, k_len: int) -> Tensor:
    """Return the same as ``mask.slots(first, last, k_len)``, for stripes from tables made once.

    Args:
        mask: What each head sees.
        first: Key slot of the first row.
        last: One past the key slot of the last row.
        k_len: Key slots, at least ``last``.

    Returns:
        ``[B, H, last - first, k_len]`` bool (``G`` heads for masks of kv heads), ``B`` = 1 where
        the batch rows do not differ; rows and keys outside the padding are False.
    """
    if not isinstance(mask, Stripes):
        return mask.slots(first, last, k_len)
    if mask.padding is None:
        return _sequence_rows(mask, first, last, k_len)[None]
    runs = mask.padding.runs(k_len)
    shape = (len(runs), mask.heads, last - first, k_len)
    out = torch.zeros(shape, dtype=torch.bool, device=mask.device)
    for b, (start, stop) in enumerate(runs):
        top, bottom = max(first, start), min(last, stop)
        if top < bottom:
            out[b, :, top - first : bottom - first, start:stop] = _sequence_rows(
                mask, top - start, bottom - start, stop - start
            )
    return out


def _sequence_rows(mask: Stripes, first: int, last: int, k_len: int) -> Tensor:
    """Return ``[H, last - first, k_len]`` bool for one sequence without padding.

    An offset's cells lie on a diagonal, so a row is a window of one table of offsets (it moves by
    one from row to row) joined with one row of columns: no index per cell, two slices in decode.
    """
    columns, offsets = stripe_tables(mask, k_len)
    size = columns.shape[1]
    near = offsets[:, size - last : size - 1 - first + k_len].unfold(1, k_len, 1)
    # Windows in order of their place in the table are the rows from the last to the first.
    seen = (near if last - first == 1 else near.flip(1)) | columns[:, None, :k_len]
    if first + 1 < k_len:
        seen.tril_(first)
    if mask.corner is not None and first < mask.corner.shape[1]:
        bottom, right = min(last, mask.corner.shape[1]), min(k_len, mask.corner.shape[1])
        seen[:, : bottom - first, :right] |= mask.corner[:, first:bottom, :right]
    return seen


def stripe_tables(mask: Stripes, k_len: int) -> tuple[Tensor, Tensor]:
    """Return ``[H, S]``, which keys are columns, and ``[H, 2 S - 1]``, which are near.

    In the second, cell ``S - 1 - r`` stands for the offset ``r``; the cells behind are keys in
    the row's future. Every key is a column of a full head. Made once for a mask and a size.

    Args:
        mask: Columns and offsets; the corner and the padding are left out.
        k_len: Tokens that the tables reach at least; ``S`` is a power of two, so that a sequence
            that grows by tokens rarely makes new tables.
    """
    size = 1 << max(8, (k_len - 1).bit_length())
    key = ("rows", size)
    if key not in mask.derived:
        columns = torch.zeros(mask.heads, size, dtype=torch.bool, device=mask.device)
        offsets = torch.zeros(mask.heads, 2 * size - 1, dtype=torch.bool, device=mask.device)
        for head, (c, r) in enumerate(zip(mask.columns, mask.offsets, strict=True)):
            columns[head, c[c < size]] = True
            offsets[head, size - 1 - r[r < size]] = True
        columns |= mask.full_heads[:, None]
        mask.derived[key] = columns, offsets
    tables: tuple[Tensor, Tensor] = mask.derived[key]
    return tables
