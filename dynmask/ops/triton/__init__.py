"""The GPU backend: exact attention by our own Triton kernels.

Prefill gathers, for each tile of query rows, the keys that it sees, so its cost follows the mask
and not the length. Decode reads the visible keys of the cache only. The backward pass needs no
atomics: it gives the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dynmask.masks import Blocks, Lifetimes, Mask, Stripes
from dynmask.ops.triton import blocks, lifetimes, stripes
from dynmask.ops.triton.lifetimes import prepare

__all__ = ["attend", "prepare", "supports"]

# Read once: it does not change, and tracing cannot look it up.
_INTERPRETED: bool = triton.knobs.runtime.interpret
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_DIM = 256


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    *,
    bias: Tensor | None,
    return_lse: bool,
) -> str | None:
    """Return None if the kernels can run the call, else the reason why not."""
    if mask is None:
        return 'without a mask there is nothing to skip; impl="sdpa" runs plain causal attention'
    if q.device.type != "cuda" and not (_INTERPRETED and q.device.type == "cpu"):
        return f"the triton backend needs CUDA tensors, these are on {q.device}"
    if q.dtype not in _DTYPES:
        return f"the triton backend runs float16, bfloat16 and float32, not {q.dtype}"
    if _INTERPRETED and q.dtype == torch.bfloat16:
        return "Triton's interpreter does not multiply bfloat16"
    if q.shape[-1] > _MOST_DIM:
        return f"the triton backend runs head sizes up to {_MOST_DIM}, not {q.shape[-1]}"
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
    """Attend by the kernels of the mask's kind.

    Keys and values of a tile of 128 query slots must be finite, hidden ones too.

    Args:
        q: ``[B, H, Q, D]``.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
        mask: What each head sees.
        bias: ``[B, G, K]`` or None.
        scale: Factor of the logits.
        return_lse: Ignored: the log-sum-exp comes for free.

    Returns:
        ``[B, H, Q, D]`` in q's dtype and ``[B, H, Q]`` float32.
    """
    if isinstance(mask, Stripes):
        return stripes.attend(q, k, v, mask, bias, scale)
    if isinstance(mask, Blocks):
        return blocks.attend(q, k, v, mask, bias, scale)
    assert isinstance(mask, Lifetimes)
    return lifetimes.attend(q, k, v, mask, bias, scale)
