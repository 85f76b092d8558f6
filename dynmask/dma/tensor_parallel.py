"""Tensor parallelism of a DMA layer: heads, and with them their scores, split over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

STYLE = "dma_score"
"""Name of `ScoreParallel` in a ``tp_plan``."""


class ScoreParallel(TensorParallelLayer):
    r"""Score the kv heads of this process, though every score reads the values of all.

    ``dt = Wdt concat(v)`` is a sum over kv heads, so each process multiplies the values that it has
    with their columns of ``Wdt`` and the products are summed over the processes: ``G`` float32
    numbers a token instead of ``G d`` values. ``A`` and, of the sum, the entries of its own kv
    heads are all that a process needs from there on.

    transformers' name for what splits a module is a style; this one is for a `ValueScore`, with
    "rowwise" for its ``dt_proj``.
    """

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        """Split ``A [G]`` over the processes."""
        # Not there in builds of torch without distributed.
        from torch.distributed.tensor import Shard, distribute_tensor

        weight = module._parameters[param]
        assert weight is not None
        split = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None)
        module._parameters[param] = nn.Parameter(split, requires_grad=weight.requires_grad)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        """Give the module the sum over processes.

        Raises:
            ValueError: If the number of processes does not divide the kv heads.
        """
        weight: Any = module.A
        groups, size, rank = weight.shape[0], mesh.size(), mesh.get_local_rank()
        if groups % size:
            raise ValueError(
                f"num_key_value_heads={groups} cannot be split over {size} processes: tensor "
                "parallelism needs a number that divides it"
            )
        first, count = rank * groups // size, groups // size
        group = mesh.get_group()

        def own(products: Tensor) -> Tensor:
            shared: Tensor = _SumOfAll.apply(products, group, first, count)
            return shared

        module.own_heads = own  # type: ignore[assignment]
        return module


class _SumOfAll(torch.autograd.Function):
    """Sum ``[B, N, G]`` over processes and return ``[B, N, count]`` from ``first`` on."""

    @staticmethod
    def forward(ctx: Any, products: Tensor, group: Any, first: int, count: int) -> Tensor:
        ctx.place = group, first, count, products.shape
        total = products.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total.narrow(-1, first, count)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        group, first, count, shape = ctx.place
        # A process has the gradient of its own heads' sums, and every product went into all.
        total = grads[0].new_zeros(shape)
        total.narrow(-1, first, count).copy_(grads[0])
        dist.all_reduce(total, group=group)
        return total, None, None, None


_styles: Any = ALL_PARALLEL_STYLES
_styles.register(STYLE, ScoreParallel())
