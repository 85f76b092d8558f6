"""Plain attention under a dense mask: the definition that every other backend is held to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dynmask.masks import Mask
from dynmask.ops.arguments import wants_gradients
from dynmask.ops.rows import causal_rows, per_query_head

# Logits alive at once; 2^24 float32 are 64 MiB.
_CELLS = 1 << 24


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 and float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    *,
    bias: Tensor | None,
    return_lse: bool,
) -> str | None:
    """Return None: the reference runs every valid call."""
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Attend block of rows by block of rows; differentiable in q, k, v and bias.

    Args:
        q: ``[B, H, Q, D]``.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
        mask: What each head sees; None means causal.
        bias: ``[B, G, K]`` or None.
        scale: Factor of the logits.
        return_lse: Ignored: the log-sum-exp comes for free.

    Returns:
        ``[B, H, Q, D]`` in q's dtype and ``[B, H, Q]`` in the accumulation dtype.
    """
    batch, heads, q_len, _ = q.shape
    k_len = k.shape[2]
    rows = max(1, _CELLS // (batch * heads * k_len))
    # Without this the backward pass would keep every block's probabilities: N x N after all.
    recompute = rows < q_len and wants_gradients(q, k, v, bias)
    blocks = []
    for top in range(0, q_len, rows):
        first = k_len - q_len + top
        args = (q[:, :, top : top + rows], k, v, mask, bias, scale, first)
        blocks.append(
            checkpoint(_block, *args, use_reentrant=False) if recompute else _block(*args)
        )
    return torch.cat([out for out, _ in blocks], 2), torch.cat([lse for _, lse in blocks], 2)


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    bias: Tensor | None,
    scale: float,
    first: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, dim = q.shape
    groups, k_len = k.shape[1], k.shape[2]
    work = accumulation_dtype(q.dtype)
    if mask is None:
        seen = causal_rows(first, first + rows, k_len, q.device)
    else:
        seen = per_query_head(mask.slots(first, first + rows, k_len), heads)
    # The query heads of a group are stacked as rows, so keys are read once and never repeated.
    stacked = q.to(work).reshape(batch, groups, -1, dim) * scale
    k = k.to(work)
    finite = bool(k.isfinite().all())
    logits = stacked @ k.transpose(2, 3) if finite else _with_hidden(stacked, k)
    logits = logits.view(batch, groups, -1, rows, k_len)
    if bias is not None:
        logits = logits + bias.to(work)[:, :, None, None]
    logits = logits.view(batch, heads, rows, k_len).masked_fill(~seen, float("-inf"))
    top = logits.detach().amax(-1, keepdim=True)
    empty = top == float("-inf")
    weights = (logits - top.masked_fill(empty, 0)).exp()
    total = weights.sum(-1, keepdim=True).masked_fill(empty, 1)
    out = weights.view(batch, groups, -1, k_len) @ v.to(work)
    if not bool(v.isfinite().all()):
        out = _without_hidden(weights, seen, v.to(work))
    out = out.view(batch, heads, rows, dim) / total
    lse = (top + total.log()).squeeze(-1)
    return out.to(q.dtype), lse


def _with_hidden(q: Tensor, k: Tensor) -> Tensor:
    """Return ``q k^T`` for keys that are not all finite, without a gradient where they are not.

    Hidden from a row, such a key would make the row's gradient 0 * inf.
    """
    finite = k.isfinite()
    logits = q @ k.masked_fill(~finite, 0).transpose(2, 3)
    with torch.no_grad():
        whole = q @ k.transpose(2, 3)
    return torch.where(finite.all(-1)[:, :, None], logits, whole)


def _without_hidden(weights: Tensor, seen: Tensor, v: Tensor) -> Tensor:
    """Return ``weights @ v`` for values that are not all finite: a hidden one adds 0, not 0 * inf.

    Where a row sees such a value the result is NaN in that dimension.
    """
    groups, k_len = v.shape[1:3]
    finite = v.isfinite()
    out = weights.view(len(v), groups, -1, k_len) @ v.masked_fill(~finite, 0)
    shown = seen.expand(weights.shape).to(v.dtype).view(len(v), groups, -1, k_len)
    return out.masked_fill(shown @ (~finite).to(v.dtype) > 0, float("nan"))
