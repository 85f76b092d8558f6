"""Blocks on the GPU: their lists of blocks become lists of keys that never expire."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from dynmask.masks import Blocks
from dynmask.masks.triton.block_lists import block_lists, immortal, list_tile
from dynmask.masks.triton.block_tiles import block_tiles
from dynmask.masks.triton.library import LIBRARY, fake, operator
from dynmask.masks.triton.schedule import TILE, TileLists
from dynmask.ops.arguments import wants_gradients
from dynmask.ops.first_order import first_order
from dynmask.ops.triton import operators
from dynmask.ops.triton.blocks_backward import backward
from dynmask.ops.triton.common import incoming, like_gradients, on_hopper
from dynmask.ops.triton.decode import MOST_ROWS
from dynmask.ops.triton.forward import forward

# Lists of more than this are made and used for a part of the rows at a time.
_LIST_BYTES = 1 << 30


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Blocks, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend; a few rows of one tile without gradients by the decode kernel, else by gathered keys.

    The lists take ``4 M block`` bytes per tile of query rows, or ``4 K`` if that is less; long ones
    are made for a part of the rows at a time. Listed keys and values must be finite, hidden or not.

    Args:
        q: ``[B, H, Q, D]``.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
        mask: Which key blocks each tile of query rows sees.
        bias: ``[B, G, K]`` or None.
        scale: Factor of the logits.

    Returns:
        ``[B, H, Q, D]`` in q's dtype and ``[B, H, Q]`` float32.
    """
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    bias = None if bias is None else bias.float().contiguous()
    grad = wants_gradients(q, k, v, bias)
    q_len, k_len = q.shape[2], k.shape[2]
    first, last = (k_len - q_len) // mask.tile, (k_len - 1) // mask.tile
    if first == last and q.shape[1] // k.shape[1] * q_len <= MOST_ROWS and not grad:
        seen = mask.table(first, first + 1, k_len)[:, :, 0]
        seen = seen.repeat_interleave(mask.block, -1)[..., :k_len]
        # A key that the tile does not see is dead before it.
        expiry = immortal(mask, k_len).where(seen, 0).expand(k.shape[:3])
        return operators.attend_decode(q, k, v, bias, expiry, scale, False)
    rows = _rows_at_once(mask, q_len, k_len)
    parts = []
    for top in range(0, q_len, rows):
        # Rows at the end of a shorter sequence: later keys are not visible anyway.
        end = min(top + rows, q_len)
        last_key = k_len - q_len + end
        part = q[:, :, top:end], k[:, :, :last_key], v[:, :, :last_key]
        parts.append(
            _attend_rows(*part, mask, None if bias is None else bias[:, :, :last_key], scale)
        )
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, mask: Blocks, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    expiry = immortal(mask, k.shape[2])
    return _attend(q, k, v, bias, expiry, mask.indices, mask.counts, mask.block, mask.tile, scale)


def _rows_at_once(mask: Blocks, q_len: int, k_len: int) -> int:
    """Return how many rows' lists take no more than `_LIST_BYTES`, one tile's at least."""
    batch, groups, _, most = mask.indices.shape
    if mask.padding is not None:
        batch = max(batch, len(mask.padding.start))
    tile = list_tile(mask.tile)
    tiles = _LIST_BYTES // max(1, 4 * batch * groups * min(most * mask.block, k_len))
    # The first tile and the last one may be cut.
    return q_len if tiles >= q_len // tile + 2 else max(1, tiles) * tile


def _lists(
    q: Tensor, k: Tensor, expiry: Tensor, indices: Tensor, counts: Tensor, block: int, tile: int
) -> tuple[Tensor, TileLists]:
    """Return expiry and lists for all batch rows and kv heads."""
    made = block_lists(indices, counts, expiry, block=block, tile=tile, q_len=q.shape[2])
    keys, full, partial = (t.expand(*k.shape[:2], *t.shape[2:]) for t in made)
    lists = TileLists(keys, full.contiguous(), partial.contiguous())
    return expiry.expand(k.shape[:3]), lists


@operator("blocks_attention")
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    expiry: Tensor,
    indices: Tensor,
    counts: Tensor,
    block: int,
    tile: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp; differentiable in q, k, v and bias."""
    expiry, lists = _lists(q, k, expiry, indices, counts, block, tile)
    if on_hopper(q) and list_tile(tile) == TILE:
        run = importlib.import_module("dynmask.ops.triton.hopper").forward
        out, lse = run(q, k, v, bias, expiry, lists, scale, immortal=False)
    else:
        out, lse = forward(q, k, v, bias, expiry, lists, scale, tile=list_tile(tile))
    return out, lse


@fake("blocks_attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    expiry: Tensor,
    indices: Tensor,
    counts: Tensor,
    block: int,
    tile: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@operator("blocks_backward")
def _attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    expiry: Tensor,
    indices: Tensor,
    counts: Tensor,
    block: int,
    tile: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
) -> list[Tensor]:
    """Return the gradients in q, k, v and, if there is one, bias; makes the lists again."""
    expiry, lists = _lists(q, k, expiry, indices, counts, block, tile)
    shape = {"block": block, "tile": tile, "q_len": q.shape[2], "k_len": k.shape[2]}
    turned = block_tiles(indices, counts, **shape)
    args = (q, k, v, bias, expiry, lists, turned, block, tile, scale, out, lse, grad, grad_lse)
    return [t for t in backward(*args) if t is not None]


@fake("blocks_backward")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    expiry: Tensor,
    indices: Tensor,
    counts: Tensor,
    block: int,
    tile: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
) -> list[Tensor]:
    return like_gradients(q, k, v, bias)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.block, ctx.tile, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, grad_lse):  # type: ignore[no-untyped-def]
    *tensors, out, lse = ctx.saved_tensors
    rest = [None] * 6
    if grad is None and grad_lse is None:
        return None, None, None, None, *rest
    grad, grad_lse = incoming(out, grad, grad_lse)
    args = (*tensors, ctx.block, ctx.tile, ctx.scale, out, lse, grad, grad_lse)
    found = _attend_backward(*args)
    dq, dk, dv, *dbias = first_order(found, *tensors[:4], grad, grad_lse)
    return dq, dk, dv, dbias[0] if dbias else None, *rest


torch.library.register_autograd(
    "dynmask::blocks_attention", _gradients, setup_context=_save, lib=LIBRARY
)
