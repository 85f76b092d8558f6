"""Stripes on the GPU: what the kernels run, and the calls that a mask and its padding need."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dynmask.masks import Stripes
from dynmask.masks.triton.library import fake, operator
from dynmask.ops.triton.stripes_decode import MOST_ROWS, decode
from dynmask.ops.triton.stripes_forward import forward, tiles
from dynmask.ops.triton.stripes_tables import (
    StripeKeys,
    TileTables,
    most_keys,
    stripe_keys,
    tile_tables,
)


def supports(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str | None:
    """Return None if the kernels run such calls, dtype and head size aside, else why not."""
    inputs = [t for t in (q, k, v, bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return "the triton backend has no backward pass for Stripes; use torch.no_grad()"
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Stripes, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend; a few rows by the decode kernel, else by tiles of each sequence's own rows.

    Hidden keys and values of a sequence must be finite; those of padding are not read.

    Args:
        q: ``[B, H, Q, D]``.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
        mask: What each head sees.
        bias: ``[B, G, K]`` or None.
        scale: Factor of the logits.

    Returns:
        ``[B, H, Q, D]`` in q's dtype and ``[B, H, Q]`` float32.
    """
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    bias = None if bias is None else bias.float().contiguous()
    q_len, k_len = q.shape[2], k.shape[2]
    parts, runs = [(0, k_len)], None
    if mask.padding is not None:
        parts = mask.padding.runs(k_len)
        runs = torch.stack([mask.padding.start, mask.padding.stop], 1).int()
    keys = list(stripe_keys(mask, k_len))
    corner = mask.merged_corner
    size = 0 if corner is None else corner.shape[1]
    # First position of any sequence that has a query row.
    first = min((max(k_len - q_len - a, 0) for a, b in parts if a < b), default=k_len)
    if q_len <= MOST_ROWS and first >= size:
        return _decode(q, k, v, bias, keys, runs, most_keys(mask, k_len), scale)
    tile, block, _, _ = tiles(q)
    tables = list(tile_tables(mask, k_len, tile, block))
    last = max(b - a for a, b in parts)
    return _prefill(q, k, v, bias, keys, tables, corner, runs, first, last, scale)


@operator("stripes_attention")
def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    keys: list[Tensor],
    tables: list[Tensor],
    corner: Tensor | None,
    runs: Tensor | None,
    first: int,
    last: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend from positions ``first`` to ``last - 1`` of each sequence; other rows get 0."""
    if runs is None:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    else:
        out = torch.zeros_like(q)
        lse = q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
    tile = tiles(q)[0]
    begin, end = first // tile, triton.cdiv(last, tile)
    edge = begin
    if corner is not None:
        edge = max(begin, min(end, triton.cdiv(corner.shape[1], tile)))
    made = StripeKeys(*keys), TileTables(*tables)
    for low, high, inside in ((begin, edge, corner), (edge, end, None)):
        if low < high:
            forward(
                q,
                k,
                v,
                bias,
                *made,
                inside,
                runs,
                out,
                lse,
                scale,
                first=low,
                last=high,
            )
    return out, lse


@fake("stripes_attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    keys: list[Tensor],
    tables: list[Tensor],
    corner: Tensor | None,
    runs: Tensor | None,
    first: int,
    last: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@operator("stripes_decode")
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    keys: list[Tensor],
    runs: Tensor | None,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return decode(q, k, v, bias, StripeKeys(*keys), runs, most, scale)


@fake("stripes_decode")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    keys: list[Tensor],
    runs: Tensor | None,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
