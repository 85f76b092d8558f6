"""Torch's scaled_dot_product_attention: the dense kernels that are on every machine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dynmask.masks import Stripes
from dynmask.ops.reference import causal_slots

# Mask cells alive at once.
_CELLS = 1 << 25


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Stripes | None,
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
    mask: Stripes | None,
    bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend with ``is_causal`` where that is the mask, else under dense masks, rows in blocks.

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
    plain = bias is None and (mask is None or (mask.all_full and mask.padding is None))
    if plain and q_len in (1, k_len):
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=q_len > 1, scale=scale, enable_gqa=gqa
        )
        return out, None
    rows = max(1, _CELLS // (batch * heads * k_len))
    blocks = []
    for top in range(0, q_len, rows):
        first = k_len - q_len + top
        last = min(first + rows, k_len)
        if mask is None:
            seen = causal_slots(first, last, last, q.device)
        else:
            seen = mask.slots(first, last, k_len)[..., :last]
        given, empty = _mask_and_empty(seen, bias, q, groups, last)
        out = functional.scaled_dot_product_attention(
            q[:, :, top : top + rows],
            k[:, :, :last],
            v[:, :, :last],
            attn_mask=given,
            scale=scale,
            enable_gqa=gqa,
        )
        blocks.append(out if empty is None else out.masked_fill(empty[..., None], 0))
    return torch.cat(blocks, 2), None


def _mask_and_empty(
    seen: Tensor, bias: Tensor | None, q: Tensor, groups: int, k_len: int
) -> tuple[Tensor, Tensor | None]:
    """Return SDPA's mask and ``[.., H, rows]`` bool of empty rows, which get a harmless mask.

    Kernels differ in what they make of a row without keys (NaN, a mean, 0), so none gets one.
    """
    if bias is None:
        empty = ~seen.any(-1)
        if not bool(empty.any()):
            return seen, None
        return seen | empty[..., None], empty
    per_head = bias[:, :, :k_len].to(q.dtype).repeat_interleave(q.shape[1] // groups, 1)
    given = per_head[:, :, None].masked_fill(~seen, float("-inf"))
    empty = (given == float("-inf")).all(-1)
    return given.masked_fill(empty[..., None], 0), empty
