"""What an attention call must satisfy, and the error that names what does not."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from dynmask.masks import Blocks, Lifetimes, Mask, Padding, Stripes


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    bias: Tensor | None,
    scale: float | None = None,
) -> None:
    """Refuse arguments that do not fit together; shapes as in `dynmask.ops.attention`.

    Raises:
        ValueError: Naming the argument and the fix.
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a torch tensor, got {type(value).__name__}")
        if value.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, D], got {list(value.shape)}")
        if value.dtype != q.dtype or value.device != q.device:
            raise ValueError(
                f"{name} is {value.dtype} on {value.device} but q is {q.dtype} on {q.device}: "
                "bring q, k and v to one dtype and device"
            )
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"q must be float16, bfloat16, float32 or float64, got {q.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {list(k.shape)} and {list(v.shape)}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"q {list(q.shape)} and k {list(k.shape)} must agree in batch and in D (first and last)"
        )
    heads, groups = q.shape[1], k.shape[1]
    if groups == 0 or heads % groups:
        raise ValueError(f"q's {heads} heads must be a multiple of k's {groups}")
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} rows but k only {k.shape[2]} keys: k and v must hold the rows' "
            "own tokens too"
        )
    if q.shape[3] == 0:
        raise ValueError("q, k and v have D=0: heads need a width of at least 1")
    if scale is not None:
        _check_scale(scale)
    if mask is not None:
        _check_mask(q, k, mask)
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise ValueError(f"bias must be a torch tensor or None, got {type(bias).__name__}")
        if bias.shape != k.shape[:3] or not bias.is_floating_point():
            raise ValueError(
                f"bias must be float [B, G, K] = {list(k.shape[:3])}, got {list(bias.shape)} "
                f"{bias.dtype}"
            )
        if bias.device != q.device:
            raise ValueError(f"bias is on {bias.device} but q on {q.device}")


def _check_scale(scale: float) -> None:
    if isinstance(scale, Tensor) or not isinstance(scale, Real | torch.SymFloat):
        raise ValueError(
            f"scale must be a plain number or None, got {type(scale).__name__}: for a learned one "
            "pass q * factor and scale=1.0"
        )
    if not 0 < scale < math.inf:
        raise ValueError(f"scale={scale} must be over 0 and finite: for another pass q * scale")


def _check_mask(q: Tensor, k: Tensor, mask: Mask) -> None:
    if not isinstance(mask, Mask):
        raise ValueError(
            f"mask must be dynmask Stripes, Lifetimes, Blocks or None, got {type(mask).__name__}: "
            "for padding alone use Stripes.causal(heads) & Padding.from_mask(attention_mask)"
        )
    if isinstance(mask, Stripes) and mask.heads != q.shape[1]:
        raise ValueError(f"mask has {mask.heads} heads but q has {q.shape[1]}")
    if isinstance(mask, Lifetimes):
        _check_groups("mask.expiry", mask.expiry, k)
        if mask.expiry.shape[2] != k.shape[2]:
            raise ValueError(
                f"mask.expiry is for {mask.expiry.shape[2]} keys but k has {k.shape[2]}: build the "
                "mask from this call's keys, cached ones included"
            )
    if isinstance(mask, Blocks):
        _check_groups("mask.indices", mask.indices, k)
        if mask.capacity < k.shape[2]:
            raise ValueError(
                f"mask.indices has {mask.indices.shape[2]} tiles of {mask.tile} slots but k has "
                f"{k.shape[2]} slots: every slot needs a tile"
            )
    if mask.device != q.device:
        raise ValueError(f"mask is on {mask.device} but q on {q.device}: use mask.to(q.device)")
    if not isinstance(mask, Lifetimes) and mask.padding is not None:
        _check_padding(q, k, mask.padding)


def _check_groups(name: str, value: Tensor, k: Tensor) -> None:
    if value.shape[0] not in (1, k.shape[0]) or value.shape[1] not in (1, k.shape[1]):
        raise ValueError(
            f"{name} is for {value.shape[0]} batch rows and {value.shape[1]} kv heads, k has "
            f"{k.shape[0]} and {k.shape[1]}: give 1 or as many of each"
        )


def _check_padding(q: Tensor, k: Tensor, padding: Padding) -> None:
    rows, end = len(padding.start), padding.end
    if rows != q.shape[0]:
        raise ValueError(f"mask.padding has {rows} rows but the batch {q.shape[0]}")
    if end > k.shape[2]:
        raise ValueError(
            f"mask.padding ends at slot {end} but k has {k.shape[2]} slots: build the "
            "padding from this call's attention mask"
        )


def wants_gradients(*inputs: Tensor | None) -> bool:
    """Tell whether a backward pass may follow a call with these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
