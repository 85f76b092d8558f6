"""Stripes on the GPU: what the kernels run, and the calls that a mask and its padding need."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dynmask.masks import Stripes
from dynmask.masks.triton.library import LIBRARY, fake, operator
from dynmask.ops.arguments import wants_gradients
from dynmask.ops.first_order import first_order
from dynmask.ops.triton import stripes_dkdv, stripes_dq
from dynmask.ops.triton.common import incoming, like_gradients
from dynmask.ops.triton.stripes_backward import backward
from dynmask.ops.triton.stripes_decode import MOST_ROWS, decode
from dynmask.ops.triton.stripes_forward import forward, tiles
from dynmask.ops.triton.stripes_tables import (
    StripeKeys,
    TileTables,
    corner_parts,
    most_keys,
    stripe_keys,
    tile_tables,
)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Stripes, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend; few rows without gradients by the decode kernel, else by each sequence's own tiles.

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
    grad = wants_gradients(q, k, v, bias)
    if q_len <= MOST_ROWS and first >= size and not grad:
        return _decode(q, k, v, bias, keys, runs, most_keys(mask, k_len), scale)
    last = max(b - a for a, b in parts)
    most = max(len(c) for c in mask.columns)
    tables = list(tile_tables(mask, k_len, *tiles(q)[:2]))
    of_dq: list[Tensor] = []
    of_dkdv: list[Tensor] = []
    if grad:
        of_dq += tile_tables(mask, k_len, *stripes_dq.tiles(q)[:2])
        of_dkdv += tile_tables(mask, k_len, *stripes_dkdv.tiles(q)[:2])
    made = tables, of_dq, of_dkdv, corner, runs, first, last, most
    return _prefill(q, k, v, bias, keys, *made, scale)


@operator("stripes_attention")
def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    keys: list[Tensor],
    tables: list[Tensor],
    dq_tables: list[Tensor],
    dkdv_tables: list[Tensor],
    corner: Tensor | None,
    runs: Tensor | None,
    first: int,
    last: int,
    most_columns: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend from positions ``first`` to ``last - 1`` of each sequence; other rows get 0.

    Differentiable in q, k, v and bias where it is given the backward pass's tables.
    """
    if runs is None:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    else:
        out = torch.zeros_like(q)
        lse = q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
    tile = tiles(q)[0]
    made = StripeKeys(*keys), TileTables(*tables)
    for low, high, inside in corner_parts(first // tile, triton.cdiv(last, tile), tile, corner):
        forward(q, k, v, bias, *made, inside, runs, out, lse, scale, first=low, last=high)
    return out, lse


@fake("stripes_attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    keys: list[Tensor],
    tables: list[Tensor],
    dq_tables: list[Tensor],
    dkdv_tables: list[Tensor],
    corner: Tensor | None,
    runs: Tensor | None,
    first: int,
    last: int,
    most_columns: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@operator("stripes_backward")
def _prefill_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    keys: list[Tensor],
    dq_tables: list[Tensor],
    dkdv_tables: list[Tensor],
    corner: Tensor | None,
    runs: Tensor | None,
    first: int,
    last: int,
    most_columns: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
) -> list[Tensor]:
    """Return the gradients in q, k, v and, if there is one, bias."""
    made = StripeKeys(*keys), TileTables(*dq_tables), TileTables(*dkdv_tables)
    mask = (*made, most_columns, corner, runs)
    rows = (out, lse, grad, grad_lse)
    grads = backward(q, k, v, bias, *mask, scale, *rows, first=first, last=last)
    return [t for t in grads if t is not None]


@fake("stripes_backward")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    keys: list[Tensor],
    dq_tables: list[Tensor],
    dkdv_tables: list[Tensor],
    corner: Tensor | None,
    runs: Tensor | None,
    first: int,
    last: int,
    most_columns: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
) -> list[Tensor]:
    return like_gradients(q, k, v, bias)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, bias, keys, tables, dq_tables, dkdv_tables, corner, runs, *ctx.sizes = inputs
    ctx.tables = len(tables)
    ctx.save_for_backward(q, k, v, bias, corner, runs, *output, *keys, *dq_tables, *dkdv_tables)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, bias, corner, runs, out, lse, *rest = ctx.saved_tensors
    n = len(StripeKeys._fields)
    keys, tables = rest[:n], rest[n:]
    no_grads = [[None] * n, [None] * ctx.tables, *[[None] * (len(tables) // 2)] * 2, *[None] * 6]
    if grad is None and grad_lse is None:
        return None, None, None, None, *no_grads
    grad, grad_lse = incoming(out, grad, grad_lse)
    made = keys, tables[: len(tables) // 2], tables[len(tables) // 2 :]
    args = (q, k, v, bias, *made, corner, runs, *ctx.sizes, out, lse, grad, grad_lse)
    found = _prefill_backward(*args)
    dq, dk, dv, *dbias = first_order(found, q, k, v, bias, grad, grad_lse)
    return dq, dk, dv, dbias[0] if dbias else None, *no_grads


torch.library.register_autograd(
    "dynmask::stripes_attention", _gradients, setup_context=_save, lib=LIBRARY
)


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
