"""Which steps of dynamic masks run in Triton kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynmask.masks.lifetimes import HAS_TRITON

_MODULES = {
    "landmarks": "dynmask.dam.triton.landmarks",
    "block_costs": "dynmask.dam.triton.cost",
    "keep": "dynmask.dam.triton.keep",
    "choice_lists": "dynmask.dam.triton.lists",
    "attend_listed": "dynmask.ops.triton.listed",
    "quantized_stats": "dynmask.dam.triton.pages",
    "choose_pages": "dynmask.dam.triton.choose",
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_DIM = 256
"""Head size of the kernels, at most."""
# Of a block that a program holds on the chip: to look for landmarks, or as 4-bit keys in float32.
_MOST_CELLS = 1 << 16
_MOST_MARKS = 64
# Blocks of a decode step, in a program's registers.
_MOST_PAGES = 16384


def on_gpu(x: Tensor) -> bool:
    """Tell whether Triton kernels can read a tensor: on CUDA, of 16 or 32 bits."""
    return x.is_cuda and x.dtype in _DTYPES and HAS_TRITON


def by_kernels(
    x: Tensor, name: str, *, cells: int = 0, marks: int = 1, queries: int = 1, pages: int = 0
) -> Callable[..., Any] | None:
    """Return the kernel's function of this name, or None where torch must do.

    Args:
        x: What it would run on: CUDA tensors of 16 or 32 bits, heads of up to 256.
        name: "landmarks", "block_costs", "keep", "choice_lists", "attend_listed",
            "quantized_stats" or "choose_pages".
        cells: Numbers of a block; "landmarks" and "quantized_stats" take up to 65,536.
        marks: Landmarks of a block; "block_costs" takes powers of two up to 64.
        queries: Queries of a tile or step, up to 64.
        pages: Blocks that a step chooses from; "choose_pages" takes up to 16,384.
    """
    if not on_gpu(x):
        return None
    if name != "keep" and x.shape[-1] > MOST_DIM:
        return None
    if (
        cells > _MOST_CELLS
        or pages > _MOST_PAGES
        or marks & (marks - 1)
        or max(marks, queries) > _MOST_MARKS
    ):
        return None
    module = importlib.import_module(_MODULES[name])
    found: Callable[..., Any] = getattr(module, name)
    return found
