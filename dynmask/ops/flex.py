"""Torch FlexAttention: a portable block-sparse kernel that torch compiles for the mask at hand.

On CUDA tensors the kernel is compiled at the first call of each kind (mask, dtype, heads, head
size, bias). On CPU tensors it runs uncompiled, with all logits in memory: for tests.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynmask.masks import Mask
from dynmask.ops.arguments import wants_gradients
from dynmask.ops.flex_blocks import block_mask
from dynmask.ops.reference import accumulation_dtype

# Kinds of calls that keep a compiled kernel; torch's own limit of 8 is soon spent.
_KERNELS = 256


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    *,
    bias: Tensor | None,
    return_lse: bool,
) -> str | None:
    """Return None if FlexAttention can run the call, else the reason why not."""
    from torch.nn.attention import flex_attention

    if not hasattr(flex_attention, "AuxRequest"):
        return f"torch {torch.__version__} is too old for it: upgrade torch"
    if q.device.type not in ("cuda", "cpu"):
        return f"the flex backend needs CUDA or CPU tensors, these are on {q.device}"
    if q.device.type == "cpu":
        if wants_gradients(q, k, v, bias):
            return "FlexAttention has no backward pass on the CPU; wrap the call in torch.no_grad()"
        return None
    if q.dtype == torch.float64:
        return "FlexAttention's CUDA kernels have no float64"
    if not 16 <= q.shape[3] <= 256:
        return f"FlexAttention's CUDA kernels need D from 16 to 256, got {q.shape[3]}"
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
    """Attend block by block where the mask may show anything; differentiable on CUDA.

    Masked keys and values must be finite: the kernel computes and discards them in listed blocks.

    Args:
        q: ``[B, H, Q, D]``.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
        mask: What each head sees; None means causal.
        bias: ``[B, G, K]`` or None.
        scale: Factor of the logits.
        return_lse: Whether to compute the log-sum-exp.

    Returns:
        ``[B, H, Q, D]`` in q's dtype and ``[B, H, Q]`` or None.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    if q.device.type == "cpu":  # It looks at requires_grad in no_grad mode too.
        q, k, v = q.detach(), k.detach(), v.detach()
        bias = None if bias is None else bias.detach()
    with torch.no_grad():
        blocks = block_mask(mask, q, k)
    out, aux = _kernel(q.device.type)(
        q,
        k,
        v,
        score_mod=None if bias is None else _adds(bias, q),
        block_mask=blocks,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=return_lse),
    )
    return out, aux.lse if return_lse else None


def _adds(bias: Tensor, q: Tensor) -> Callable[..., Tensor]:
    """Return the function that adds ``bias [B, G, K]`` to a logit."""
    ratio = q.shape[1] // bias.shape[1]
    bias = bias.to(accumulation_dtype(q.dtype))

    def add(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return score + bias[b, h // ratio, key]

    return add


@functools.cache
def _kernel(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    def plain(*args: Any, **more: Any) -> Any:
        with warnings.catch_warnings():
            # Wanted: a kernel for the CPU takes half a minute to compile.
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            return flex_attention(*args, **more)

    if device == "cpu":
        return plain
    compiled = torch.compile(flex_attention, fullgraph=True)

    def run(*args: Any, **more: Any) -> Any:
        if torch.compiler.is_compiling():  # The caller's own graph takes the kernel in.
            return flex_attention(*args, **more)
        with torch._dynamo.config.patch(recompile_limit=_KERNELS):
            return compiled(*args, **more)

    return run
