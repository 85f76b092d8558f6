"""Which blocks to keep: those of largest cost, as few as leave little to the others."""

from __future__ import annotations

import torch
from torch import Tensor


def keep(cost: Tensor, far: Tensor, allowed: float) -> Tensor:
    """Keep the blocks of largest cost, as few as leave a sum of at most ``allowed`` to the others.

    Blocks of equal cost are kept or left together: kept, if leaving all of them is too much.

    Args:
        cost: ``[B, G, T, N]``, finite and not negative; 0 for blocks that are not far.
        far: ``[T]`` int64: how many blocks are far, the first ones; no other block is kept.
        allowed: What the blocks that are not kept may cost together.

    Returns:
        ``[B, G, T, N]`` bool.
    """
    count = cost.shape[3]
    if count == 0:
        return torch.zeros_like(cost, dtype=torch.bool)
    rising = cost.sort(-1).values
    left = (rising.cumsum(-1) <= allowed).sum(-1, keepdim=True)
    # The first cost that is too much, whatever else of its size there is.
    least = rising.gather(-1, left.clamp_max(count - 1))
    is_far = torch.arange(count, device=far.device) < far[:, None]
    return (cost >= least) & (left < count) & is_far
