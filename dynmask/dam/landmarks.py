"""A few keys that stand for a block of them."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmask.ops.reference import accumulation_dtype


def landmarks(k: Tensor, count: int) -> Tensor:
    r"""Return the ``count - 1`` keys of each block that lie farthest apart, and the others' mean.

    The first is the key farthest from the block's mean, and each next one the farthest from the
    mean and those taken, by Euclidean distance; of equally far keys the first. So a key that
    differs from its neighbours, as a fact in running text does, stands for itself. Together with
    their counts (1 each, and ``block - count + 1`` for the mean) landmarks have the block's mean.

    Args:
        k: ``[B, G, n, block, D]``, ``n`` blocks.
        count: Landmarks of a block, 1 to ``block``.

    Returns:
        ``[B, G, n, count, D]``, the mean last.

    Source: farthest-point sampling, T. F. Gonzalez, Theoretical Computer Science 38 (1985).
    """
    block = k.shape[3]
    far = k.to(accumulation_dtype(k.dtype))
    total = far.sum(3)
    if count == 1:
        return (total / block).unsqueeze(3).to(k.dtype)
    distance = (far - (total / block).unsqueeze(3)).square().sum(-1)
    taken = []
    for _ in range(count - 1):
        place = distance.argmax(-1, keepdim=True)
        key = far.gather(3, place[..., None].expand(*place.shape, k.shape[4]))
        taken.append(key)
        distance = torch.minimum(distance, (far - key).square().sum(-1))
        # Among equal keys it must not be taken again.
        distance.scatter_(-1, place, -1.0)
    chosen = torch.cat(taken, 3)
    rest = (total - chosen.sum(3)) / (block - count + 1)
    return torch.cat([chosen, rest.unsqueeze(3)], 3).to(k.dtype)
