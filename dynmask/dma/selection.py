"""Which keys a DMA layer keeps: the best of them, those above a bound, and the nearest ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dynmask.dma.nearest import delayed, select_tokens
from dynmask.dma.slots import Slots
from dynmask.masks import Lifetimes

Keep = int | float | Sequence[int | None] | None
"""How many keys a row keeps: see `keep_of`."""


def check_keep(keep: Keep, layers: int, window: int = 0) -> None:
    """Refuse a keep rule that means nothing, or has no place for the window.

    Args:
        keep: As in `keep_of`.
        layers: Decoder layers of the model.
        window: As in `select`.

    Raises:
        ValueError: Naming what is wrong with it.
    """
    _check_rule(keep, layers)
    if isinstance(window, bool) or not isinstance(window, int) or window < 0:
        raise ValueError(f"window={window!r} must be an integer of at least 0")
    for entry in keep if isinstance(keep, Sequence) else (keep,):
        if isinstance(entry, int) and entry < window:
            raise ValueError(
                f"window={window} is more than keep={entry}, the keys that a row sees, nearest "
                "ones included: lower window or raise keep"
            )


def _check_rule(keep: Keep, layers: int) -> None:
    if isinstance(keep, Sequence) and not isinstance(keep, str):
        if len(keep) != layers:
            raise ValueError(f"keep has {len(keep)} entries for {layers} layers: give one a layer")
        for entry in keep:
            if isinstance(entry, (float, Sequence)):
                raise ValueError(f"keep by layer must hold integers or None, got {entry!r}")
            _check_rule(entry, layers)
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
    window: int = 0,
    threshold: float | None = None,
    slots: Slots | None = None,
) -> Lifetimes:
    """Return the keys that every row sees: the nearest, and the best of the older ones.

    Ties go to the earlier key. Without a window nothing forces a row's own token, its neighbours or
    the first tokens into the set. A ``keep`` of at least ``K`` drops nothing; the score still acts
    as a bias.

    Args:
        score: ``[B, G, K]`` float, compared in float32. No gradient flows through the selection.
        keep: ``w``, at least 1; None keeps all.
        window: Nearest real tokens that a row sees whatever their scores, its own included; they
            are some of the ``keep``, of which more do not count. 0 chooses all by score.
        threshold: Keys with a lower score (or NaN) are never admitted, but for the nearest. So a
            row may see fewer than ``keep`` keys, or none: its output is then 0. None admits all.
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
        return select_tokens(score, keep, window, threshold=threshold, real=real)
    window = min(window, keep)
    padding = None if real is None else slots.padding
    slot = torch.arange(count, dtype=torch.int32, device=score.device)
    if window < keep:
        mask = Lifetimes.top(score, keep=keep - window, padding=padding, documents=slots.documents)
    else:
        mask = Lifetimes._trusted(slot.expand(score.shape), 0)
    if threshold is not None:
        # A key below the threshold evicts none above it, so hiding it afterwards is the same.
        mask = Lifetimes._trusted(torch.where(score >= threshold, mask.expiry, slot), mask.most)
    if not window:
        return mask
    # Within a document, and its run of real tokens, slots count as tokens do.
    mask = delayed(mask, window) & slots.documents
    return mask if padding is None else mask & padding
