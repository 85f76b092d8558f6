"""Which keys a bounded cache admits, shows and gives up, in plain torch and without waiting."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmask.masks import Lifetimes
from dynmask.masks.lifetimes import NEVER, _expiry_of_top
from dynmask.ops.gather import take


def select(score: Tensor, keep: int, shown: Tensor | None, *, offset: int = 0) -> Lifetimes:
    """Return the causal top ``keep`` among some of the keys, without a wait for the device.

    Args:
        score: ``[B, G, K]`` float.
        keep: ``w``, at least 1.
        shown: ``[B, G, K]`` bool, which keys there are; None for all. Unlike the runs of a
            `Padding` they may lie anywhere and differ by kv head.
        offset: First row that matters, as in `Lifetimes.top`.

    Returns:
        The mask ``[B, G, K]``.
    """
    if shown is None:
        return Lifetimes.top(score, keep=keep, offset=offset)
    heads, count = score.shape[:2].numel(), score.shape[2]
    slot = torch.arange(count, dtype=torch.int32, device=score.device)
    if count <= keep:
        return Lifetimes._trusted(torch.where(shown, NEVER, slot), keep)
    # Ranked first by whether a key is there: what is not beats nothing that is, -inf included.
    expiry = _expiry_of_top(
        score.detach().reshape(heads, 1, count), keep, shown.reshape(heads, count).int(), offset
    )
    return Lifetimes._trusted(torch.where(shown, expiry.view(score.shape), slot), keep)


def ending_with(present: Tensor | None, mask: Lifetimes, first: int) -> Lifetimes:
    """Return the mask with rows emptied that stand behind the last real token of their batch row.

    Args:
        present: ``[B, Q]`` bool, which tokens from slot ``first`` on are real; None for all.
        mask: Over ``first + Q`` slots.
        first: Slot of the first row.
    """
    if present is None:
        return mask
    slot = torch.arange(1, present.shape[1] + 1, dtype=torch.int32, device=present.device)
    end = first + torch.where(present, slot, 0).amax(-1)
    return Lifetimes._trusted(torch.minimum(mask.expiry, end[:, None, None].int()), mask.most)


def check_present(present: Tensor, shape: torch.Size) -> None:
    """Refuse flags of real tokens that are not bool of ``shape``, ``[B, Q]`` or ``[B]``.

    Raises:
        ValueError: Naming the fix.
    """
    if present.shape != shape or present.dtype != torch.bool:
        raise ValueError(
            f"present must be {list(shape)} bool, got {list(present.shape)} {present.dtype}: pass "
            "attention_mask[:, -Q:].bool() for Q new tokens"
        )


def admitted(score: Tensor, present: Tensor | None, threshold: float | None) -> Tensor | None:
    """Return which keys may be admitted at all.

    Args:
        score: ``[B, G, Q]`` float.
        present: ``[B, Q]`` bool, False for padding; None for all True.
        threshold: Lowest score, compared in float32; NaN is below. None admits all.

    Returns:
        ``[B, G, Q]`` bool, or None for all.
    """
    shown = None if threshold is None else score.detach() >= threshold
    if present is not None:
        real = present[:, None].expand(score.shape)
        shown = real if shown is None else shown & real
    return shown


def rows_at(source: Tensor, slot: Tensor) -> Tensor:
    """Return a copy of ``source[b, g, slot[b, g, n]]``.

    Args:
        source: ``[B, G, K, D]``, any strides.
        slot: ``[B, G, N]`` int64.
    """
    if source.device.type == "cpu":  # There `gather` copies number by number.
        return take(source, torch.arange(source.shape[1]), slot)
    return source.gather(2, slot[..., None].expand(-1, -1, -1, source.shape[3]))


def insert_by_torch(
    kept_k: Tensor,
    kept_v: Tensor,
    kept_score: Tensor,
    order: Tensor,
    expiry: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    present: Tensor | None,
    threshold: float | None,
) -> None:
    """Write one token a batch row into the slots; see `BoundedKeys.insert` for the arguments.

    The last arrival of the lowest score is what leaves; an empty slot counts as a key of -inf that
    came last of all, and the new key as the last but those.
    """
    k, v, score = k.detach(), v.detach(), score.detach().float()
    ranked = _comparable(kept_score).masked_fill(order < 0, -torch.inf)
    lowest = ranked.amin(-1, keepdim=True)
    # -1 becomes the largest number that there is.
    arrival = order.long() & 0xFFFFFFFF
    slot = arrival.masked_fill(ranked != lowest, -1).argmax(-1, keepdim=True)
    taken = (_comparable(score) > lowest) | (order.gather(-1, slot) < 0)
    if threshold is not None:
        taken &= score >= threshold
    if present is not None:
        taken &= present[:, None, None]
    rows = slot[..., None].expand_as(k)
    for kept, new in ((kept_k, k), (kept_v, v)):
        kept.scatter_(2, rows, torch.where(taken[..., None], new, kept.gather(2, rows)))
    newest = order.amax(-1, keepdim=True) + 1
    for state, value in ((kept_score, score), (order, newest), (expiry, NEVER)):
        old = state.gather(-1, slot)
        state.scatter_(-1, slot, torch.where(taken, value, old))


def _comparable(score: Tensor) -> Tensor:
    return score.masked_fill(score.isnan(), -torch.inf)
