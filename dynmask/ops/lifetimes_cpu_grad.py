"""Gradients of the cpu backend under `Lifetimes`: the tiles of the forward pass once more.

Weights are computed again from the log-sum-exp ``L`` of each row, so nothing of size ``Q x K`` is
kept. With ``P = exp(S - L)``, ``D = rowsum(dO * O) - dL`` and ``dS = P * (dO V^T - D)``:
``dV = P^T dO``, ``dQ = scale dS K``, ``dK = scale dS^T Q``, ``dbias = colsum(dS)``.

Source: the backward pass of arXiv 2205.14135, with a gradient of the log-sum-exp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynmask.masks import Lifetimes
from dynmask.ops.first_order import first_order
from dynmask.ops.lifetimes_cpu import attend_tiles, hide
from dynmask.ops.lifetimes_schedule import Runs, tiles


class TiledAttention(torch.autograd.Function):
    """`lifetimes_cpu.attend_tiles` with gradients, for finite keys and values."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Lifetimes,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Return output ``[B, H, Q, D]`` and log-sum-exp ``[B, H, Q]``."""
        out, lse = attend_tiles(q, k, v, mask, bias, scale, True, finite=True)
        assert lse is not None
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.mask, ctx.scale = mask, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k, v and bias."""
        q, k, v, bias, out, lse = ctx.saved_tensors
        # Autocast would make products of other dtypes than the sums that they go into.
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            *found, d_bias = _gradients(
                q, k, v, bias, out, lse, *gradients, mask=ctx.mask, scale=ctx.scale
            )
            made = [gradient.to(q.dtype) for gradient in found]
            if bias is not None:
                made.append(d_bias.to(bias.dtype))
        made = list(first_order(made, q, k, v, bias, *gradients))
        return *made, *[None] * (6 - len(made))


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor,
    *,
    mask: Lifetimes,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv and dbias in the accumulation dtype."""
    work = lse.dtype
    d_out = d_out.to(work)
    delta = (d_out * out.to(work)).sum(-1) - d_lse
    # A row without keys has only hidden logits: their exponentials are 0 against any finite number.
    lse = lse.masked_fill(lse == -torch.inf, 0)
    dq, dk, dv = (torch.zeros(x.shape, dtype=work) for x in (q, k, v))
    d_bias = torch.zeros(k.shape[:3], dtype=work)
    (batch, groups), dim = k.shape[:2], q.shape[3]
    mask_batch, mask_groups = mask.expiry.shape[:2]
    ratio = q.shape[1] // groups
    runs = Runs.build(mask, q.shape[2])
    size, _ = runs.best(ratio)
    by_group = [x.unflatten(1, (groups, ratio)) for x in (q, d_out, lse, delta, dq)]
    most = ratio * size * int(runs.counts(size).max())
    memory = q.new_empty(2, most, dtype=work)
    for tile in tiles(runs, size, work):
        span, slots = slice(tile.top, tile.last), tile.slots
        stacked = ratio * (tile.last - tile.top)
        weights, d_logits = (x[: stacked * len(slots)].view(stacked, -1) for x in memory)
        own_batch, own_group = divmod(tile.owner, mask_groups)
        for b in range(batch) if mask_batch == 1 else (own_batch,):
            for g in range(groups) if mask_groups == 1 else (own_group,):
                rows, d_rows, tops, deltas, into = (x[b, g, :, span] for x in by_group)
                rows = (rows.to(work) * scale).reshape(-1, dim)
                d_rows = d_rows.reshape(-1, dim)
                keys = k[b, g].index_select(0, slots).to(work)
                values = v[b, g].index_select(0, slots).to(work)
                torch.mm(rows, keys.T, out=weights)
                if bias is not None:
                    weights += bias[b, g].index_select(0, slots)
                hide(weights, tile)
                weights.sub_(tops.reshape(-1, 1)).exp_()
                dv[b, g].index_add_(0, slots, weights.T @ d_rows)
                torch.mm(d_rows, values.T, out=d_logits)
                d_logits.sub_(deltas.reshape(-1, 1)).mul_(weights)
                into.copy_((d_logits @ keys).mul_(scale).view_as(into))
                dk[b, g].index_add_(0, slots, d_logits.T @ rows)
                if bias is not None:
                    d_bias[b, g].index_add_(0, slots, d_logits.sum(0))
    return dq, dk, dv, d_bias
