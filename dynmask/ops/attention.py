"""The one public attention function and the choice of what runs it."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from dynmask.masks import Stripes
from dynmask.ops import cpu, reference, sdpa

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "sdpa": sdpa, "reference": reference}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Stripes | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attend under a mask, exactly: ``softmax(scale * q k^T + bias, visible keys only) v``.

    Row ``i`` of ``q`` stands at key slot ``K - Q + i`` (causal, aligned bottom-right), so decode
    and chunked prefill need no offset. Query head ``h`` reads key head ``h // (H / G)``; keys are
    never repeated. A row that sees no key gives 0, its log-sum-exp is -inf and its gradients are 0.

    Hidden keys and values may hold anything with ``"reference"`` and ``"cpu"``. With ``"sdpa"``,
    and so with ``"auto"``, they must be finite, as for torch's own function.

    Args:
        q: ``[B, H, Q, D]``, any strides; float16, bfloat16, float32 or float64.
        k: ``[B, G, K, D]`` with ``H % G == 0`` and ``Q <= K``.
        v: ``[B, G, K, D]``.
        mask: What each head sees; None means causal.
        bias: ``[B, G, K]`` float, added to the scaled logits of every row that sees the key.
        scale: Factor of the logits; ``1 / sqrt(D)`` by default.
        impl: ``"auto"`` (see `choose`), or a backend by name: ``"cpu"``, ``"sdpa"``,
            ``"reference"``. A named backend never falls back to another.
        return_lse: Also return the log-sum-exp of each row's visible logits.

    Returns:
        ``[B, H, Q, D]`` in q's dtype; with ``return_lse`` also ``[B, H, Q]`` in the accumulation
        dtype (float32, or float64 for float64 inputs).

    Raises:
        ValueError: If the arguments do not fit together, or the named backend cannot run them.
    """
    _check(q, k, v, mask, bias)
    if impl == "auto":
        impl = choose(q, k, v, mask, bias=bias, return_lse=return_lse)
    else:
        reason = supports(impl, q, k, v, mask, bias=bias, return_lse=return_lse)
        if reason is not None:
            raise ValueError(f'impl="{impl}" cannot run this call: {reason}; or use impl="auto"')
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if q.numel() == 0:
        lse = q.new_zeros(q.shape[:-1], dtype=reference.accumulation_dtype(q.dtype))
        return (q.clone(), lse) if return_lse else q.clone()
    out, lse = BACKENDS[impl].attend(q, k, v, mask, bias, scale, return_lse)
    return (out, lse) if return_lse else out


def supports(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Stripes | None = None,
    *,
    bias: Tensor | None = None,
    return_lse: bool = False,
) -> str | None:
    """Tell whether a backend can run a call.

    Args:
        impl: Backend name.
        q: As in `attention`, and so are the other arguments.
        k: See `attention`.
        v: See `attention`.
        mask: See `attention`.
        bias: See `attention`.
        return_lse: See `attention`.

    Returns:
        None if it can, else the reason why not.

    Raises:
        ValueError: If there is no such backend.
    """
    if impl not in BACKENDS:
        raise ValueError(f'no impl "{impl}": use one of {["auto", *BACKENDS]}')
    reason: str | None = BACKENDS[impl].supports(q, k, v, mask, bias=bias, return_lse=return_lse)
    return reason


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Stripes | None = None,
    *,
    bias: Tensor | None = None,
    return_lse: bool = False,
) -> str:
    """Name the backend that ``impl="auto"`` runs.

    The first that fits, in this order: ``cpu`` where it supports the call and its schedule costs
    less than a dense kernel's causal pairs (`dynmask.ops.cpu.pays`), ``sdpa``, ``reference``.
    Depends on shapes, dtypes, device, grad mode and the mask only, never on a clock.

    Args:
        q: As in `attention`, and so are the other arguments.
        k: See `attention`.
        v: See `attention`.
        mask: See `attention`.
        bias: See `attention`.
        return_lse: See `attention`.
    """

    def fits(impl: str) -> bool:
        return supports(impl, q, k, v, mask, bias=bias, return_lse=return_lse) is None

    if mask is not None and fits("cpu") and cpu.pays(q, k, mask):
        return "cpu"
    return "sdpa" if fits("sdpa") else "reference"


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Stripes | None, bias: Tensor | None) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
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
    if mask is not None:
        if not isinstance(mask, Stripes):
            raise ValueError(
                f"mask must be dynmask Stripes or None, got {type(mask).__name__}: for padding "
                "alone use Stripes.causal(heads) & Padding.from_mask(attention_mask)"
            )
        if mask.heads != heads:
            raise ValueError(f"mask has {mask.heads} heads but q has {heads}")
        if mask.device != q.device:
            raise ValueError(f"mask is on {mask.device} but q on {q.device}: use mask.to(q.device)")
        if mask.padding is not None:
            rows, end = len(mask.padding.start), mask.padding.end
            if rows != q.shape[0]:
                raise ValueError(f"mask.padding has {rows} rows but the batch {q.shape[0]}")
            if end > k.shape[2]:
                raise ValueError(
                    f"mask.padding ends at slot {end} but k has {k.shape[2]} slots: build the "
                    "padding from this call's attention mask"
                )
    if bias is not None:
        if bias.shape != k.shape[:3] or not bias.is_floating_point():
            raise ValueError(
                f"bias must be float [B, G, K] = {list(k.shape[:3])}, got {list(bias.shape)} "
                f"{bias.dtype}"
            )
        if bias.device != q.device:
            raise ValueError(f"bias is on {bias.device} but q on {q.device}")
