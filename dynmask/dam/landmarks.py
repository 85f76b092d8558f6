"""A few vectors that stand for a block of them."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmask.ops.reference import accumulation_dtype


def landmarks(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return ``count - 1`` vectors of each block that lie far apart, and the mean of the others.

    The first is the vector farthest from the block's mean, and each next one the farthest from the
    mean and those taken, by Euclidean distance; of equally far ones the first. So a key that
    differs from its neighbours, as a fact in running text does, stands for itself. Together with
    their counts (1 each, and ``block - count + 1`` for the mean) landmarks have the block's mean.

    Args:
        x: ``[B, G, n, block, D]``, keys or queries in ``n`` blocks, or ``[B, G, n, R, tile, D]``,
            the block's axis in two.
        count: Landmarks of a block, 1 to ``block``.

    Returns:
        ``[B, G, count, n, D]``, contiguous, the mean last, and ``[B, G, n, count - 1]`` int64, the
        places of the others in their block.

    Source: farthest-point sampling, T. F. Gonzalez, Theoretical Computer Science 38 (1985).
    """
    x = x if x.dim() == 5 else x.flatten(3, 4)
    block, dim = x.shape[3:]
    wide = x.to(accumulation_dtype(x.dtype))
    total = wide.sum(3)
    # From the mean, so that little is lost in the differences of squares below.
    apart = wide - (total / block).unsqueeze(3)
    norm = apart.square().sum(-1)
    products = apart @ apart.mT
    distance = norm.clone()
    none = 64 * torch.finfo(wide.dtype).eps
    places = torch.empty(*x.shape[:3], count - 1, dtype=torch.int64, device=x.device)
    for i in range(count - 1):
        place = distance.argmax(-1, keepdim=True)
        places[..., i : i + 1] = place
        row = products.gather(3, place[..., None].expand(*place.shape, block)).squeeze(3)
        norms = norm + norm.gather(-1, place)
        away = row.mul_(-2).add_(norms)
        # What rounding leaves between equal vectors must not choose among them.
        away.masked_fill_(away <= none * norms, 0.0)
        torch.minimum(distance, away, out=distance)
        # Among equal vectors it must not be taken again.
        distance.scatter_(-1, place, -1.0)
    chosen = wide.gather(3, places[..., None].expand(*places.shape, dim))
    rest = (total - chosen.sum(3)) / (block - count + 1)
    marks = torch.cat([chosen, rest.unsqueeze(3)], 3).to(x.dtype)
    return marks.transpose(2, 3).contiguous(), places
