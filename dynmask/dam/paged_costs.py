"""What it would cost the rows of a decode step to see a block of keys as one summary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dynmask.ops.reference import accumulation_dtype


class PageStats(NamedTuple):
    r"""What some query rows find in each block of keys, ``[B, G, R, n]`` each.

    Attributes:
        top: The largest logit ``l`` of a block.
        mass: ``sum of exp(l - top)``.
        square: ``sum of exp(2 (l - top))``.
        summary: The logit of the mean key.
    """

    top: Tensor
    mass: Tensor
    square: Tensor
    summary: Tensor


def page_stats(q: Tensor, k: Tensor, means: Tensor, scale: float) -> PageStats:
    """Return the statistics of blocks of keys.

    Args:
        q: ``[B, G, R, D]``, the rows of a kv head.
        k: ``[B, G, n, block, D]``.
        means: ``[B, G, n, D]``, the mean key of each block.
        scale: Factor of the logits.
    """
    q = q * scale
    work = accumulation_dtype(q.dtype)
    logits = (q @ k.flatten(2, 3).mT).to(work).unflatten(3, k.shape[2:4])
    top = logits.amax(-1)
    weights = logits.sub_(top.unsqueeze(-1)).exp_()
    mass = weights.sum(-1)
    return PageStats(top, mass, weights.square_().sum(-1), (q @ means.mT).to(work))


def page_costs(stats: PageStats, near: Tensor, block: int) -> Tensor:
    r"""Return ``[B, G, n]``, the mean over the rows of what each block's summary would cost.

    .. math:: r_J = \operatorname{mean}_{rows} \sum_{j \in J} (P_j - A_J)^2
        = \operatorname{mean}_{rows} \Big(\sum_j P_j^2 - 2 A_J \sum_j P_j + block \, A_J^2\Big)

    with the softmax ``P = exp(l) / Z`` and the weight ``A = exp(summary) / Z`` that a summary gives
    to each of its keys: `dynmask.dam.dynamic_cost.block_costs` with every key its own landmark.

    Args:
        stats: Of the blocks.
        near: ``[B, G, R]``, the log of the summed weights of the keys that are in no block.
        block: Keys of a block.
    """
    mass = stats.top + stats.mass.log()
    total = torch.logaddexp(near, mass.logsumexp(-1)).unsqueeze(-1)
    share = (mass - total).exp_()
    square = stats.square * (2 * (stats.top - total)).exp_()
    # No mean of logits is above the log of the mean weight, but those of 4-bit keys may be.
    summary = (stats.summary - total).clamp_max_(0).exp_()
    cost = square - 2 * summary * share + block * summary.square()
    return cost.clamp_min_(0).mean(2)
