"""Masks, inputs and a slow attention that shares no code with the package."""

import itertools
import math

import torch
from torch import Tensor

from dynmask.masks import Blocks, Lifetimes, Padding, Stripes


def naive_mask(mask: Stripes, q_len: int, k_len: int) -> Tensor:
    """The definition in DESIGN.md, pair by pair."""
    batch = 1 if mask.padding is None else len(mask.padding.start)
    out = torch.zeros(batch, mask.heads, q_len, k_len, dtype=torch.bool)
    columns = [set(c.tolist()) for c in mask.columns]
    offsets = [set(r.tolist()) for r in mask.offsets]
    size = 0 if mask.corner is None else mask.corner.shape[1]
    for b in range(batch):
        start, stop = 0, k_len
        if mask.padding is not None:
            start, stop = int(mask.padding.start[b]), int(mask.padding.stop[b])
        for h in range(mask.heads):
            for row in range(q_len):
                for key in range(k_len):
                    if not (start <= k_len - q_len + row < stop and start <= key < stop):
                        continue
                    i, j = k_len - q_len + row - start, key - start
                    out[b, h, row, key] = j <= i and (
                        bool(mask.full_heads[h])
                        or j in columns[h]
                        or i - j in offsets[h]
                        or (i < size and bool(mask.corner[h, i, j]))
                    )
    return out


def naive_lifetimes(mask: Lifetimes, q_len: int) -> Tensor:
    """``[B, G, Q, K]``, pair by pair."""
    batch, groups, k_len = mask.expiry.shape
    out = torch.zeros(batch, groups, q_len, k_len, dtype=torch.bool)
    for b, g in itertools.product(range(batch), range(groups)):
        expiry = mask.expiry[b, g].tolist()
        for row, j in itertools.product(range(q_len), range(k_len)):
            out[b, g, row, j] = j <= k_len - q_len + row < expiry[j]
    return out


def naive_blocks(mask: Blocks, q_len: int, k_len: int) -> Tensor:
    """``[B, G, Q, K]``, pair by pair."""
    lists, groups = mask.indices.shape[:2]
    runs = [(0, k_len)] * lists
    if mask.padding is not None:
        runs = list(zip(mask.padding.start.tolist(), mask.padding.stop.tolist(), strict=True))
    batch = max(lists, len(runs))
    out = torch.zeros(batch, groups, q_len, k_len, dtype=torch.bool)
    for b, g, row in itertools.product(range(batch), range(groups), range(q_len)):
        i, at = k_len - q_len + row, b % lists
        tile = i // mask.tile
        listed = mask.indices[at, g, tile].tolist()[: int(mask.counts[at, g, tile])]
        start, stop = runs[b % len(runs)]
        for j in range(i + 1):
            real = start <= j and i < stop
            out[b, g, row, j] = real and j // mask.block in listed
    return out


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | None = None, dtype=torch.float64
) -> Tensor:
    """Eager attention with repeated keys in ``dtype``; empty rows give 0.

    ``seen`` has ``H``, ``G`` or 1 heads.
    """
    ratio = q.shape[1] // k.shape[1]
    q, k, v = (t.to(dtype) for t in (q, k, v))
    k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
    if seen.shape[1] not in (1, q.shape[1]):
        seen = seen.repeat_interleave(ratio, 1)
    logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if bias is not None:
        logits = logits + bias.to(dtype).repeat_interleave(ratio, 1)[:, :, None]
    logits = logits.masked_fill(~seen, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0) @ v


def stripes(heads: int, length: int, *, seed: int = 0, corner: int = 0, full=()) -> Stripes:
    """Mixed stripes: a window with holes, lone offsets, early and scattered columns."""
    g = torch.Generator().manual_seed(seed)
    columns, offsets = [], []
    for head in range(heads):
        window = torch.arange(1 + (7 * head + 5) % max(2, length // 3))
        holes = torch.arange(0, length // 2 + 1, 2) if head % 3 == 2 else window[:0]
        lone = torch.randint(length, (3,), generator=g)
        offsets.append(torch.cat([window, holes, lone]).unique())
        scattered = torch.randint(length, (length // 8,), generator=g)
        columns.append(torch.cat([torch.arange(head % 3), scattered]).unique())
    return Stripes(
        tuple(columns),
        tuple(offsets),
        torch.tensor([h in full for h in range(heads)]),
        torch.rand(heads, corner, corner, generator=g).gt(0.6).tril() if corner else None,
    )


def lifetimes(batch: int, groups: int, length: int, *, keep: int = 9, seed: int = 0) -> Lifetimes:
    """The top keys of random scores."""
    g = torch.Generator().manual_seed(seed)
    return Lifetimes.top(torch.randn(batch, groups, length, generator=g), keep=keep)


def blocks(
    batch: int, groups: int, length: int, *, block: int = 8, tile: int = 12, seed: int = 0
) -> Blocks:
    """Random key blocks for each tile, some of them in its future; some tiles see none."""
    g = torch.Generator().manual_seed(seed)
    tiles, width = -(-length // tile), -(-length // block)
    shape = (batch, groups, tiles)
    indices = torch.rand(*shape, width, generator=g).argsort(-1).int()
    counts = torch.randint(0, width // 2 + 2, shape, generator=g).clamp_max(width).int()
    return Blocks(indices, counts, block, tile)


def tensors(batch, heads, groups, q_len, k_len, dim, *, dtype=torch.float32, seed=0):
    """Random q, k, v; k and v hold the rows' own tokens too."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, q_len, dim, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, batch, groups, k_len, dim, generator=g, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def padding(*runs: tuple[int, int]) -> Padding:
    """Padding from ``(start, stop)`` pairs."""
    start, stop = torch.tensor(runs).T
    return Padding(start, stop)
