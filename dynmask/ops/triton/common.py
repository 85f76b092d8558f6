"""What the kernels share: tile sizes by a plain table, dtypes, offsets."""

from __future__ import annotations

import importlib
import math
from functools import cache

import torch
import triton
from torch import Tensor

LOG2E = math.log2(math.e)


def padded_dim(dim: int) -> int:
    """Return the head size as the matrix units want it: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(dim))


def dot_precision(q: Tensor) -> str:
    """Return the precision of products: full for float32, whose tf32 would miss the error bound."""
    return "ieee" if q.dtype == torch.float32 else "tf32"


def int32_offsets(*tensors: Tensor) -> bool:
    """Tell whether offsets inside one batch row, over its heads and tokens, fit 32 bits."""
    return all(t.shape[1] * t.stride(1) + t.shape[2] * t.stride(2) < 2**31 for t in tensors)


def forward_tiles(q: Tensor, *, short: bool) -> tuple[int, int, int, int]:
    """Return rows, keys, warps and pipeline stages of a forward program.

    With ``short`` a program has few rows, so that a few hundred rows are spread over more of them.
    """
    dim = padded_dim(q.shape[-1])
    if q.dtype == torch.float32:
        return (64, 32, 4, 2) if dim <= 128 else (32, 32, 4, 2)
    if short:
        return (32, 128, 4, 2) if dim <= 128 else (32, 64, 4, 2)
    if dim <= 64:
        return 128, 128, 4, 3
    if dim <= 128:
        return 128, 64, 4, 3
    return 128, 64, 8, 2


def dq_tiles(q: Tensor) -> tuple[int, int, int, int]:
    """Return rows, keys, warps and pipeline stages of a program of dq."""
    dim = padded_dim(q.shape[-1])
    if q.dtype == torch.float32:
        return (32, 32, 4, 1)
    if dim <= 64:
        return 128, 64, 4, 3
    if dim <= 128:
        return 128, 64, 8, 3
    return 64, 32, 4, 2


def dkdv_tiles(q: Tensor) -> tuple[int, int, int, int]:
    """Return rows, keys, warps and pipeline stages of a program of dk and dv."""
    dim = padded_dim(q.shape[-1])
    if q.dtype == torch.float32:
        return (32, 32, 4, 1)
    if dim <= 64:
        return 64, 128, 4, 3
    if dim <= 128:
        return 64, 128, 8, 2
    return 32, 64, 8, 2


def fit_rows(q: Tensor, packed: int, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Return rows, keys, warps and stages of a program for a tile of ``packed`` rows.

    A tile of few rows leaves most of a large program idle. With a list for each token and two query
    heads a kv head, programs of 128 rows took 17.2 ms, those of 16 rows and one warp 3.1
    (`benchmarks/row_lists.py`).

    Args:
        q: ``[B, H, Q, D]``.
        packed: Rows of the tile, those of all query heads of a kv head.
        shape: What programs have where there are rows enough.
    """
    rows, keys, _, stages = shape
    if packed >= rows:
        return shape
    if packed <= 16 and q.dtype != torch.float32 and padded_dim(q.shape[-1]) <= 128:
        return 16, 32, 1, 3
    return max(16, triton.next_power_of_2(packed)), keys, 4, stages


def incoming(
    out: Tensor, grad: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients in an output and its log-sum-exp as the kernels read them."""
    grad = torch.zeros_like(out) if grad is None else grad
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    return grad, None if grad_lse is None else grad_lse.contiguous()


def like_gradients(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Return empty tensors of the gradients' shapes, for tracing."""
    like = [torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)]
    return like if bias is None else [*like, bias.new_empty(bias.shape)]


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors; a stand-in where Triton's interpreter runs."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def launches_early(device: torch.device) -> bool:
    """Tell whether a kernel can be launched before the one it waits for has ended (sm_90 on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def on_hopper(q: Tensor) -> bool:
    """Tell whether the Hopper kernels run a call: half precision, head size 64 or 128."""
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] in (64, 128)
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and _has_gluon()
    )


@cache
def _has_gluon() -> bool:
    try:
        importlib.import_module("dynmask.ops.triton.gluon")
    except ImportError:
        return False
    return True
