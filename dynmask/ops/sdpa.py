"""Torch's scaled_dot_product_attention: the dense kernels that are on every machine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dynmask.masks import Mask, Padding, Stripes
from dynmask.ops.rows import causal_rows, dense_rows, per_query_head

# Mask cells alive at once, so that memory stays bounded. CPU kernels copy the mask as floats, and
# are fastest where that copy stays in the cache; a GPU wants large launches.
_CELLS = 1 << 25
_CPU_CELLS = 1 << 20


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    *,
    bias: Tensor | None,
    return_lse: bool,
) -> str | None:
    """Return None if SDPA can run the call, else the reason why not."""
    if return_lse:
        return "scaled_dot_product_attention does not return the log-sum-exp"
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend with ``is_causal`` where that is the mask, else under dense masks, rows in blocks.

    Masked keys and values must be finite, as in torch: its kernels compute and discard them.

    Args:
        q: ``[B, H, Q, D]``.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
        mask: What each head sees; None means causal.
        bias: ``[B, G, K]`` or None.
        scale: Factor of the logits.
        return_lse: Must be False.

    Returns:
        ``[B, H, Q, D]`` in q's dtype, and None for the log-sum-exp.
    """
    batch, heads, q_len, _ = q.shape
    groups, k_len = k.shape[1], k.shape[2]
    gqa = heads != groups
    plain = mask is None or (isinstance(mask, Stripes) and mask.all_full and mask.padding is None)
    if plain and bias is None and q_len in (1, k_len):
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=q_len > 1, scale=scale, enable_gqa=gqa
        )
        return out, None
    cells = _CPU_CELLS if q.device.type == "cpu" else _CELLS
    rows = max(1, cells // max(1, batch * heads * k_len))
    blocks = []
    for top in range(0, q_len, rows):
        first = k_len - q_len + top
        last = min(first + rows, k_len)
        empty = None
        if mask is None:
            seen = causal_rows(first, last, last, q.device)
        else:
            seen = per_query_head(dense_rows(mask, first, last, last), heads)
            if bias is None:
                empty = _empty(mask, seen, first, last)
        if bias is not None:
            seen, empty = _with_bias(seen, bias[:, :, :last], q)
        elif empty is not None:
            seen |= empty[..., None]
        out = functional.scaled_dot_product_attention(
            q[:, :, top : top + rows],
            k[:, :, :last],
            v[:, :, :last],
            attn_mask=seen,
            scale=scale,
            enable_gqa=gqa,
        )
        blocks.append(out if empty is None else out.masked_fill(empty[..., None], 0))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2), None


# Kernels differ in what they make of a row without keys (NaN, a mean, 0), so none gets one: such
# rows see everything, and what comes out is replaced by 0.


def _empty(mask: Mask, seen: Tensor, first: int, last: int) -> Tensor | None:
    """Return ``[B, H or 1, rows]`` bool, the rows that see no key, or None if there is none."""
    if isinstance(mask, Stripes):  # A row of a sequence sees itself: only padding is empty.
        return _outside(mask.padding, first, last)
    return ~seen.any(-1)


def _outside(padding: Padding | None, first: int, last: int) -> Tensor | None:
    """Return ``[B, 1, rows]`` bool, the rows at padding slots, or None if there is none."""
    if padding is None:
        return None
    if all(start <= first and last <= stop for start, stop in padding.runs(last)):
        return None
    slot = torch.arange(first, last, device=padding.start.device)
    return ((slot < padding.start[:, None]) | (slot >= padding.stop[:, None]))[:, None]


def _with_bias(seen: Tensor, bias: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``[B, H, rows, K]`` to be added to the logits, and ``[B, H, rows]`` empty rows."""
    # A mask of float32 beside half precision is for torch's CPU kernels alone.
    half = q.device.type == "cpu" and q.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if half else q.dtype
    per_head = bias.to(dtype).repeat_interleave(q.shape[1] // bias.shape[1], 1)
    added = per_head[:, :, None].masked_fill(~seen, float("-inf"))
    empty = (added == float("-inf")).all(-1)
    return added.masked_fill(empty[..., None], 0), empty
