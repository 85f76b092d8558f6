"""Rows of a stripes mask as a bool matrix, for kernels that take one: fast, a block at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmask.masks import Stripes


def dense_rows(mask: Stripes, first: int, last: int, k_len: int) -> Tensor:
    """Return the same as ``mask.slots(first, last, k_len)``, from tables that are made once.

    An offset's cells lie on a diagonal, so a row is a window of one table of offsets (it moves by
    one from row to row) joined with one row of columns: no index per cell, two slices in decode.

    Args:
        mask: What each head sees.
        first: Key slot of the first row.
        last: One past the key slot of the last row.
        k_len: Key slots, at least ``last``.

    Returns:
        ``[B, H, last - first, k_len]`` bool, ``B`` = 1 without padding; rows and keys outside the
        padding are False.
    """
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
    """Return ``[H, last - first, k_len]`` bool for one sequence without padding."""
    # Sizes in powers of two, so that a sequence that grows by tokens rarely makes new tables.
    size = 1 << max(8, (k_len - 1).bit_length())
    columns, offsets = _tables(mask, size)
    near = offsets[:, size - last : size - 1 - first + k_len].unfold(1, k_len, 1)
    # Windows in order of their place in the table are the rows from the last to the first.
    seen = (near if last - first == 1 else near.flip(1)) | columns[:, None, :k_len]
    if first + 1 < k_len:
        seen.tril_(first)
    if mask.corner is not None and first < mask.corner.shape[1]:
        bottom, right = min(last, mask.corner.shape[1]), min(k_len, mask.corner.shape[1])
        seen[:, : bottom - first, :right] |= mask.corner[:, first:bottom, :right]
    return seen


def _tables(mask: Stripes, size: int) -> tuple[Tensor, Tensor]:
    """Return ``[H, size]``, which keys are columns, and ``[H, 2 size - 1]``, which are near.

    In the second, cell ``size - 1 - r`` stands for the offset ``r``; the cells behind are keys in
    the row's future.
    """
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
