"""The places of the largest scores, the same ones however many scores there are."""

from __future__ import annotations

import torch
from torch import Tensor


def best(score: Tensor, count: int) -> Tensor:
    """Return the places of the largest scores, of equal ones the earlier.

    `torch.topk` leaves ties open, and takes others of them where more scores stand behind: what a
    row sees would follow from how much text comes after it.

    Args:
        score: ``[..., n]``, compared in float32.
        count: At most ``n``.

    Returns:
        ``[..., count]`` int64, the largest first.
    """
    bits = (score.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0.
    # Floats as integers of the same order: of negative ones all bits but the sign turn around.
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    before = torch.arange(score.shape[-1] - 1, -1, -1, device=score.device)
    return (rank | before).topk(count, -1).indices
