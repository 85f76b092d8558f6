"""Gradients computed by kernels: to differentiate them once more is an error, not a zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _FirstOrder(torch.autograd.Function):
    """Its first ``count`` inputs, as functions of all of them whose derivative is an error."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "the attention kernels have first derivatives only: for gradients of gradients "
            '(create_graph=True) pass impl="reference"'
        )


def first_order(gradients: Sequence[Tensor], *inputs: Tensor | None) -> Sequence[Tensor]:
    """Return the gradients that a backward pass made of its inputs, for a graph of them if wanted.

    Without this ``create_graph=True`` would take them for constants.

    Args:
        gradients: What the backward pass returns.
        inputs: What the gradients are functions of, the incoming ones included.
    """
    if not torch.is_grad_enabled():  # The rule: no graph of the backward pass is wanted.
        return gradients
    made: tuple[Tensor, ...] = _FirstOrder.apply(
        len(gradients), *gradients, *(t for t in inputs if t is not None)
    )
    return made
