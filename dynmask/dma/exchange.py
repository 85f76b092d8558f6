"""What processes tell each other of their keys: the best of each, in one exchange."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from dynmask.dma.windowed import kept_keys

_LOWEST = torch.finfo(torch.float32).min


class Keys(NamedTuple):
    """Keys in order of position.

    Attributes:
        k: ``[B, G, n, D]``.
        v: ``[B, G, n, D]``.
        score: ``[B, G, n]`` float32.
        present: ``[B, n]`` bool, False where there is none; None for all True.
    """

    k: Tensor
    v: Tensor
    score: Tensor
    present: Tensor | None


def best(own: Keys, width: int, threshold: float | None, window: int = 0) -> Keys:
    """Return the keys of some tokens that a row behind them sees, for each kv head.

    Args:
        own: The tokens.
        width: Keys to return at most; fewer tokens are all returned.
        threshold: Keys of a lower score are never kept.
        window: Nearest tokens whose keys are, whatever their scores; from 0 to ``width``.

    Returns:
        In order of position. Where fewer than ``width`` are admitted the rest is 0, and either not
        present or of a score that no threshold admits; none of those is among the nearest
        ``window`` that are present.
    """
    batch, groups, count, dim = own.k.shape
    if count <= width:
        return own
    kept = kept_keys(
        width,
        window,
        batch=batch,
        groups=groups,
        dim=dim,
        threshold=threshold,
        dtype=own.k.dtype,
        device=own.k.device,
    )
    kept.extend(own.k, own.v, own.score, present=own.present)
    k, v, score, mask = kept.view()  # Taken in at once, they are in order.
    taken = mask.expiry > 0
    present = None if own.present is None else taken.any(1)
    return Keys(k, v, score.masked_fill(~taken, _LOWEST), present)


def gathered(own: Keys, counts: list[int], width: int, group: Any) -> list[Keys]:
    """Return what every process of a group gave, in their order; one exchange of bytes.

    Args:
        own: What this process gives: ``min(width, its count)`` keys.
        counts: Tokens of each process.
        width: Most keys of a process.
        group: The processes.
    """
    # Of equal length for all, and each tensor at a place where its numbers may lie.
    told = [own.score, own.k, own.v, *([] if own.present is None else [own.present])]
    sizes = [-(-t.nbytes // own.score.shape[2] * width // 16) * 16 for t in told]
    flat = torch.zeros(sum(sizes), dtype=torch.uint8, device=own.k.device)
    for place, tensor in zip(_places(flat, told, sizes, width), told, strict=True):
        place.narrow(_axis(tensor), 0, tensor.shape[_axis(tensor)]).copy_(tensor)
    everything = flat.new_empty(len(counts) * len(flat))
    dist.all_gather_into_tensor(everything, flat, group=group)
    parts = []
    for row, count in zip(everything.split(len(flat)), counts, strict=True):
        read = [t.narrow(_axis(t), 0, min(width, count)) for t in _places(row, told, sizes, width)]
        parts.append(Keys(read[1], read[2], read[0], read[3] if read[3:] else None))
    return parts


def joined(parts: list[Keys]) -> Keys:
    """Return the keys of several processes as one run."""
    k, v, score = (torch.cat(tensors, 2) for tensors in list(zip(*parts, strict=True))[:3])
    present = [part.present for part in parts if part.present is not None]
    return Keys(k, v, score, torch.cat(present, 1) if present else None)


def _axis(tensor: Tensor) -> int:
    """Return which dimension of one of the `Keys` counts them."""
    return 1 if tensor.dim() == 2 else 2


def _places(flat: Tensor, like: list[Tensor], sizes: list[int], width: int) -> list[Tensor]:
    """Return the tensors that lie one behind the other in ``flat``, of ``width`` keys each."""
    found = []
    for tensor, part in zip(like, flat.split(sizes), strict=True):
        shape = list(tensor.shape)
        shape[_axis(tensor)] = width
        count = torch.Size(shape).numel()
        found.append(part.view(tensor.dtype)[:count].view(shape))
    return found
