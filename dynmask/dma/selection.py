"""Which keys a DMA layer keeps: a number of them, a share of the length, or those above a bound."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dynmask.dma.slots import Slots
from dynmask.masks import Lifetimes
from dynmask.ops.bounded_rules import admitted, ending_with
from dynmask.ops.bounded_rules import select as top_of_shown

Keep = int | float | Sequence[int | None] | None
"""How many keys a row keeps: see `keep_of`."""


def check_keep(keep: Keep, layers: int) -> None:
    """Refuse a keep rule that means nothing.

    Args:
        keep: As in `keep_of`.
        layers: Decoder layers of the model.

    Raises:
        ValueError: Naming what is wrong with it.
    """
    if isinstance(keep, Sequence) and not isinstance(keep, str):
        if len(keep) != layers:
            raise ValueError(f"keep has {len(keep)} entries for {layers} layers: give one a layer")
        for entry in keep:
            if isinstance(entry, (float, Sequence)):
                raise ValueError(f"keep by layer must hold integers or None, got {entry!r}")
            check_keep(entry, layers)
        return
    if keep is None:
        return
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise ValueError(
            f"keep={keep!r} must be an integer, a share between 0 and 1, one integer a layer, "
            "or None for all keys"
        )
    if isinstance(keep, int) and keep < 1:
        raise ValueError(f"keep={keep} must be at least 1; None keeps all keys")
    if isinstance(keep, float) and not 0 < keep < 1:
        raise ValueError(
            f"keep={keep} is a share and must lie between 0 and 1: pass an integer for a number "
            "of keys, or None for all keys"
        )


def keep_of(keep: Keep, layer_idx: int, length: int) -> int | None:
    """Return the number of keys that each row of a layer keeps.

    Args:
        keep: A number of keys for all layers; a list with one number (or None) a layer; a share
            of ``length`` between 0 and 1, rounded up; None for all keys. With a share, what a row
            keeps depends on the length of the whole input, later tokens and padding included.
            Taken to be what `check_keep` lets pass.
        layer_idx: Number of the layer, from 0.
        length: Tokens at hand, used by a share only.

    Returns:
        ``w``, at least 1, or None for all keys.

    Raises:
        ValueError: If a list has no entry for this layer.
    """
    if isinstance(keep, Sequence):
        if layer_idx >= len(keep):
            raise ValueError(
                f"keep has {len(keep)} entries, none for layer_idx={layer_idx}: give one a layer"
            )
        keep = keep[layer_idx]
    if isinstance(keep, float):
        # 0.07 * 100 is a little over 7 in binary.
        return max(1, math.ceil(keep * length - 1e-9))
    return keep


def select(
    score: Tensor,
    *,
    keep: int | None,
    threshold: float | None = None,
    slots: Slots | None = None,
) -> Lifetimes:
    """Return the keys that every row keeps: the ``keep`` best it may see, of those not too low.

    Ties go to the earlier key. Nothing forces a row's own token, a local window or the first
    tokens into the set. A ``keep`` of at least ``K`` drops nothing; the score still acts as a bias.

    Args:
        score: ``[B, G, K]`` float, compared in float32. No gradient flows through the selection.
        keep: ``w``, at least 1; None keeps all.
        threshold: Keys with a lower score (or NaN) are never admitted, so a row may see fewer than
            ``keep`` keys, or none: its output is then 0. None admits all.
        slots: Which of the ``K`` slots hold real tokens, and their documents: a row selects within
            its own. None for real tokens of one document.

    Returns:
        The mask ``[B, G, K]``. Rows before the first real token, or behind the last, see nothing.

    Raises:
        ValueError: If shapes do not fit together, or with documents the real tokens of a row are
            not one run.
    """
    score = score.detach().float()
    count = score.shape[-1]
    keep = max(count, 1) if keep is None else keep
    real = None if slots is None else slots.real
    if slots is None or slots.documents is None:
        mask = top_of_shown(score, keep, admitted(score, real, threshold))
        return ending_with(real, mask, 0)
    padding = None if real is None else slots.padding
    mask = Lifetimes.top(score, keep=keep, padding=padding, documents=slots.documents)
    if threshold is None:
        return mask
    # A key below the threshold evicts none above it, so hiding it afterwards is the same.
    slot = torch.arange(count, dtype=torch.int32, device=score.device)
    return Lifetimes._trusted(torch.where(score >= threshold, mask.expiry, slot), keep)
