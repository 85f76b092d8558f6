"""A dynamic choice on the CPU: each tile gathers the keys and summaries that it sees."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmask.dam.dynamic_keys import Keys
from dynmask.dam.dynamic_select import Choice
from dynmask.ops.reference import accumulation_dtype
from dynmask.ops.softmax import softmax_


def attend_gathered(q: Tensor, keys: Keys, choice: Choice, *, first: int, scale: float) -> Tensor:
    """Attend tile by tile: one product with the gathered keys, one softmax, one with the values.

    Args:
        q: ``[B, H, n, D]`` on the CPU, the rows at positions ``first`` to ``first + n - 1``.
        keys: With summaries.
        choice: For these rows' tiles.
        first: Position of the first row.
        scale: Factor of the logits.

    Returns:
        ``[B, H, n, D]`` in q's dtype.
    """
    batch, heads, n, dim = q.shape
    groups = keys.k.shape[1]
    work = accumulation_dtype(q.dtype)
    out = torch.empty_like(q)
    future = torch.ones(choice.tile, choice.tile, dtype=torch.bool).triu(1)
    in_block = torch.arange(choice.block)
    for at, far in enumerate(choice.far.tolist()):
        begin = max(first, (choice.top + at) * choice.tile)
        end = min(first + n, (choice.top + at + 1) * choice.tile)
        rows = slice(begin - first, end - first)
        own = end - begin
        near = slice(keys.summaries + far * choice.block, keys.summaries + end)
        for b in range(batch):
            for g in range(groups):
                kept = choice.kept[b, g, at, :far]
                block = kept.nonzero()
                slots = keys.summaries + (block * choice.block + in_block).flatten()
                slots = torch.cat([(~kept).nonzero().flatten(), slots])
                k = torch.cat([keys.k[b, g, slots], keys.k[b, g, near]]).to(work)
                v = torch.cat([keys.v[b, g, slots], keys.v[b, g, near]]).to(work)
                of_group = slice(g * (heads // groups), (g + 1) * (heads // groups))
                part = q[b, of_group, rows].to(work) * scale
                logits = (part.reshape(-1, dim) @ k.t()).view(-1, own, len(k))
                logits[..., : len(slots)] += keys.bias[b, g, slots]
                logits[..., len(k) - own :].masked_fill_(future[:own, :own], float("-inf"))
                softmax_(logits)
                out[b, of_group, rows] = (
                    (logits.view(-1, len(k)) @ v).view(-1, own, dim).to(q.dtype)
                )
    return out
