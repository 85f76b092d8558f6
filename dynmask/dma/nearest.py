"""Rows that see their nearest keys whatever their scores, and choose among the older ones."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmask.masks import Lifetimes
from dynmask.masks.lifetimes import NEVER
from dynmask.ops.bounded_rules import admitted, ending_with
from dynmask.ops.bounded_rules import select as top_of_shown


def select_tokens(
    score: Tensor,
    keep: int,
    window: int,
    *,
    threshold: float | None = None,
    real: Tensor | None = None,
    offset: int = 0,
) -> Lifetimes:
    """Return which keys the rows of one document see.

    Args:
        score: ``[B, G, K]`` float.
        keep: ``w``, at least 1.
        window: Nearest real tokens that a row sees whatever their scores, its own included; more
            than ``keep`` do not count.
        threshold: Keys with a lower score (or NaN) are not chosen. None lets all be.
        real: ``[B, K]`` bool, False for padding, anywhere; None for all True.
        offset: First row that matters.

    Returns:
        The mask ``[B, G, K]``. Rows before the first real token, or behind the last, see nothing.
    """
    shown = admitted(score, real, threshold)
    window = min(window, keep)
    # Where nothing is dropped, the nearest keys are neither.
    if not window or (threshold is None and score.shape[-1] <= keep):
        return ending_with(real, top_of_shown(score, keep, shown, offset=offset), 0)
    there = None if real is None else real[:, None]
    mask = select_with_nearest(score, keep, window, shown=shown, there=there, offset=offset)
    return ending_with(real, mask, 0)


def select_with_nearest(
    score: Tensor,
    keep: int,
    window: int,
    *,
    shown: Tensor | None = None,
    there: Tensor | None = None,
    kept: int = 0,
    offset: int = 0,
) -> Lifetimes:
    """Return the mask of rows that see ``window`` nearest keys and the best of the older ones.

    A key enters the choice when it is no longer near: a row sees its nearest keys and what the
    plain choice of ``keep - window`` keys shows the row ``window`` tokens before. So every key
    lives ``window`` tokens longer than in that choice, and at least ``window``.

    Args:
        score: ``[B, G, K]`` float.
        keep: ``w``, keys that a row sees.
        window: Nearest keys of each row, its own included; from 1 to ``keep``.
        shown: ``[B, G, K]`` bool, which keys the choice may admit; None for all.
        there: ``[B, 1 or G, K]`` bool, which slots hold a token or a kept key at all, the same for
            all kv heads behind the ``kept`` slots. Others are neither seen nor counted, wherever
            they are. None for all.
        kept: The first so many slots hold keys that the choice already keeps, near to no row.
        offset: First row that matters, at least ``kept``.

    Returns:
        The mask ``[B, G, K]``.
    """
    assert 1 <= window <= keep
    count = score.shape[-1]
    slot = torch.arange(count, dtype=torch.int32, device=score.device)
    chosen = slot
    if window < keep or count <= keep:
        # With holes the tokens before a row are not told from its slot.
        first = max(kept, offset - window) if there is None else kept
        room = keep if count <= keep else keep - window
        chosen = top_of_shown(score, room, shown, offset=first).expiry
    # What no row from ``first`` on sees may have any expiry before.
    chosen = torch.maximum(chosen, slot).expand(score.shape)
    later = _later(chosen, min(window, count), there, kept)
    if there is not None:
        later = torch.where(there, later, slot)
    return Lifetimes._trusted(later, keep)


def delayed(mask: Lifetimes, window: int) -> Lifetimes:
    """Let every key live ``window`` slots longer, and at least so many.

    Args:
        mask: A choice of keys, over slots that all count.
        window: Rows that see a key before it enters the choice.
    """
    count = mask.expiry.shape[-1]
    slot = torch.arange(count, dtype=torch.int32, device=mask.device)
    later = _later(torch.maximum(mask.expiry, slot), min(window, count), None, 0)
    return Lifetimes._trusted(later, None if mask.most is None else mask.most + window)


def _later(expiry: Tensor, window: int, there: Tensor | None, kept: int) -> Tensor:
    """Return the slot of the token ``window`` tokens behind the one of each expiry."""
    if there is None:
        # NEVER stays, and what would come behind it is as good.
        return expiry.clamp_max(NEVER - window) + window
    count = expiry.shape[-1]
    slot = torch.arange(count, dtype=torch.int32, device=expiry.device)
    tokens = there[:, 0] & (slot >= kept)  # [B, K]
    # Slots of the tokens in order, then NEVER; and the tokens before each slot.
    of_token = torch.where(tokens, slot, NEVER).sort(-1).values
    of_token = torch.nn.functional.pad(of_token, (0, window + 1), value=NEVER)
    before = torch.nn.functional.pad(tokens.cumsum(-1), (1, 0))
    heads = expiry.shape[1]
    rank = before[:, None].expand(-1, heads, -1).gather(-1, expiry.clamp_max(count).long())
    return of_token[:, None].expand(-1, heads, -1).gather(-1, rank + window)
