"""The kernels as torch operators: shapes for tracing, gradients, one call each."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from dynmask.masks.triton.library import LIBRARY, fake, operator
from dynmask.masks.triton.schedule import TILE, TileLists, list_shape, tile_lists
from dynmask.masks.triton.spans import span_lists
from dynmask.ops.first_order import first_order
from dynmask.ops.triton.backward import backward
from dynmask.ops.triton.common import incoming, like_gradients, on_hopper
from dynmask.ops.triton.decode import decode
from dynmask.ops.triton.forward import forward

# Lists as operators take and give them: [keys, full, partial], or nothing where none are made.


@operator("lifetimes_schedule")
def schedule(expiry: Tensor, q_len: int, most: int) -> list[Tensor]:
    """Return `tile_lists` as a list of tensors."""
    return list(tile_lists(expiry, q_len=q_len, most=most))


@fake("lifetimes_schedule")
def _(expiry: Tensor, q_len: int, most: int) -> list[Tensor]:
    batch, groups, k_len = expiry.shape
    tiles, width = list_shape(k_len, q_len, most)
    full = expiry.new_empty(batch, groups, tiles)
    return [expiry.new_empty(batch, groups, tiles, width), full, torch.empty_like(full)]


@operator("lifetimes_attention")
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    expiry: Tensor,
    lists: list[Tensor],
    most: int,
    scale: float,
    immortal: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp by gathered tiles; differentiable in q, k, v, bias."""
    if immortal and _is_short(q, k):
        return forward(q, k, v, bias, expiry, None, scale, True, short=True)
    run = forward
    if on_hopper(q):
        run = importlib.import_module("dynmask.ops.triton.hopper").forward
    out, lse = run(q, k, v, bias, expiry, _lists(lists), scale, immortal)
    return out, lse


@fake("lifetimes_attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    expiry: Tensor,
    lists: list[Tensor],
    most: int,
    scale: float,
    immortal: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@operator("lifetimes_backward")
def attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    expiry: Tensor,
    lists: list[Tensor],
    most: int,
    scale: float,
    immortal: bool,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
) -> list[Tensor]:
    """Return the gradients in q, k, v and, if there is one, bias."""
    spans = span_lists(expiry, q_len=q.shape[2], most=most)
    args = (q, k, v, bias, expiry, _lists(lists), spans, scale, immortal)
    return [t for t in backward(*args, out, lse, grad, grad_lse) if t is not None]


@fake("lifetimes_backward")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    expiry: Tensor,
    lists: list[Tensor],
    most: int,
    scale: float,
    immortal: bool,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
) -> list[Tensor]:
    return like_gradients(q, k, v, bias)


@operator("lifetimes_decode")
def attend_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    expiry: Tensor,
    scale: float,
    immortal: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp of a few rows; not differentiable."""
    return decode(q, k, v, bias, expiry, scale, immortal)


@fake("lifetimes_decode")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    expiry: Tensor,
    scale: float,
    immortal: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _is_short(q: Tensor, k: Tensor) -> bool:
    """Tell whether tiles of `TILE` slots would leave nearly all processors idle."""
    groups, k_len = k.shape[1], k.shape[2]
    rows = q.shape[1] // groups * q.shape[2]
    return k_len <= 4 * TILE and q.shape[0] * groups * rows <= 8 * TILE


def _lists(lists: list[Tensor]) -> TileLists | None:
    return TileLists(*lists) if lists else None


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, bias, expiry, lists, ctx.most, ctx.scale, ctx.immortal = inputs
    ctx.save_for_backward(q, k, v, bias, expiry, *output, *lists)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, bias, expiry, out, lse, *lists = ctx.saved_tensors
    no_lists = [None] * len(lists)
    if grad is None and grad_lse is None:
        return None, None, None, None, None, no_lists, None, None, None
    grad, grad_lse = incoming(out, grad, grad_lse)
    args = (q, k, v, bias, expiry, lists, ctx.most, ctx.scale, ctx.immortal, out, lse, grad)
    found = attend_backward(*args, grad_lse)
    dq, dk, dv, *dbias = first_order(found, q, k, v, bias, grad, grad_lse)
    return dq, dk, dv, dbias[0] if dbias else None, None, no_lists, None, None, None


torch.library.register_autograd(
    "dynmask::lifetimes_attention", _gradients, setup_context=_save, lib=LIBRARY
)
