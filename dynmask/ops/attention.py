"""The one public attention function and the choice of what runs it."""

from __future__ import annotations

import importlib
import math
import sys
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Literal, overload

import torch
from torch import Tensor

from dynmask.masks import Lifetimes, Mask, Stripes
from dynmask.ops import cpu, reference
from dynmask.ops.arguments import check

BACKENDS = {
    "cpu": "dynmask.ops.cpu",
    "triton": "dynmask.ops.triton",
    "flex": "dynmask.ops.flex",
    "sdpa": "dynmask.ops.sdpa",
    "reference": "dynmask.ops.reference",
}
"""Where each backend lives; imported when it is first asked for, since triton is heavy."""


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
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

    Hidden keys and values may hold anything with ``"reference"`` and ``"cpu"``. With the others,
    and so with ``"auto"``, they must be finite, as for torch's own function.

    Differentiable in q, k, v and bias once; gradients of gradients are for ``"reference"``, and so
    are the transforms of `torch.func`: others may raise. Autocast changes nothing: cast q, k
    and v before.

    Args:
        q: ``[B, H, Q, D]``, any strides; float16, bfloat16, float32 or float64.
        k: ``[B, G, K, D]`` with ``H % G == 0`` and ``Q <= K``.
        v: ``[B, G, K, D]``.
        mask: What each head sees; None means causal. `Stripes` have ``H`` heads; `Lifetimes` and
            `Blocks` have ``G``, or 1 for all, and as many batch rows as q, or 1 for all.
            `Lifetimes` are for ``K`` keys exactly.
        bias: ``[B, G, K]`` float, added to the scaled logits of every row that sees the key. Up
            to 1e4: logits are float32, and beyond the backward pass of ``"triton"`` loses digits.
            ``"sdpa"`` on a GPU rounds it to q's dtype, as torch's kernels there ask.
        scale: Factor of the logits, a number over 0; ``1 / sqrt(D)`` by default.
        impl: ``"auto"`` (see `choose`), or a backend by name: ``"cpu"``, ``"triton"``,
            ``"flex"``, ``"sdpa"``, ``"reference"``. A named backend never falls back to another.
        return_lse: Also return the log-sum-exp of each row's visible logits.

    Returns:
        ``[B, H, Q, D]`` in q's dtype; with ``return_lse`` also ``[B, H, Q]`` in the accumulation
        dtype (float32, or float64 for float64 inputs).

    Raises:
        ValueError: If the arguments do not fit together, or the named backend cannot run them.
    """
    check(q, k, v, mask, bias, scale)
    if impl == "auto":
        if bias is None and _hides_nothing(mask):
            mask = None  # Torch's causal kernels are the best there are.
        impl = choose(q, k, v, mask, bias=bias, return_lse=return_lse)
    else:
        reason = supports(impl, q, k, v, mask, bias=bias, return_lse=return_lse)
        if reason is not None:
            raise ValueError(f'impl="{impl}" cannot run this call: {reason}; or use impl="auto"')
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if q.numel() == 0:
        lse = q.new_zeros(q.shape[:-1], dtype=reference.accumulation_dtype(q.dtype))
        return (q.clone(), lse) if return_lse else q.clone()
    with _without_autocast(q.device.type):
        out, lse = _backend(impl).attend(q, k, v, mask, bias, scale, return_lse)
    return (out, lse) if return_lse else out


def _without_autocast(kind: str) -> AbstractContextManager[object]:
    """Return what turns autocast off: backends would differ in what it makes of their inputs."""
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _hides_nothing(mask: Mask | None) -> bool:
    if isinstance(mask, Stripes):
        return mask.all_full and mask.padding is None
    return isinstance(mask, Lifetimes) and mask.is_causal


def supports(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
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
    if not isinstance(impl, str) or impl not in BACKENDS:
        raise ValueError(f'no impl "{impl}": use one of {["auto", *BACKENDS]}')
    try:
        backend = _backend(impl)
    except ImportError as missing:
        return f"it cannot be imported here ({missing})"
    reason: str | None = backend.supports(q, k, v, mask, bias=bias, return_lse=return_lse)
    return reason


def _backend(impl: str) -> ModuleType:
    name = BACKENDS[impl]
    if torch.compiler.is_compiling() and impl == "triton":
        import dynmask.ops.triton as backend  # Dynamo follows this, but not import_module.

        return backend
    return sys.modules[name] if name in sys.modules else importlib.import_module(name)


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    bias: Tensor | None = None,
    return_lse: bool = False,
) -> str:
    """Name the backend that ``impl="auto"`` runs.

    The first that fits, in this order: ``cpu`` where it supports the call and its schedule costs
    less than a dense kernel's causal pairs (`dynmask.ops.cpu.pays`), ``triton`` on CUDA tensors
    with a mask or a bias, ``sdpa``, ``reference``. Never ``flex``, which compiles when first
    called. Depends on shapes, dtypes, device, grad mode and the mask only, never on a clock.

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

    if mask is not None and q.numel() and fits("cpu") and cpu.pays(q, k, mask):
        return "cpu"
    # With neither mask nor bias torch's causal kernels are the best there are.
    if q.is_cuda and (mask is not None or bias is not None) and fits("triton"):
        return "triton"
    return "sdpa" if fits("sdpa") else "reference"


def resolve(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    *,
    bias: Tensor | None = None,
) -> str:
    """Name the backend that runs a call of a method that hides keys in some calls only.

    Args:
        impl: ``"auto"``, or the backend that must run the calls that hide keys. Those that hide
            none (no mask) it runs too if it can: ``cpu`` and ``triton`` are for masks alone.
        q: As in `attention`, and so are the other arguments.
        k: See `attention`.
        v: See `attention`.
        mask: See `attention`.
        bias: See `attention`.

    Raises:
        ValueError: If there is no such backend.
    """
    if impl == "auto" or (mask is None and supports(impl, q, k, v, mask, bias=bias) is not None):
        return choose(q, k, v, mask, bias=bias)
    return impl
