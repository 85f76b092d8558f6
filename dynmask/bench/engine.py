"""What is measured against the baselines: the three steps of sparse attention."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from dynmask.bench.inputs import Inputs, Settings
from dynmask.masks import Lifetimes
from dynmask.ops import attention, choose, supports


class Select(Protocol):
    """``(score, keep, offset) -> mask``, right for the rows from ``offset`` on."""

    def __call__(self, score: Tensor, keep: int, offset: int = 0) -> Lifetimes:
        """Return the mask."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """Selection, schedule and attention of one backend, as functions that can be replaced.

    Args:
        impl: Name of the backend.
        select: ``(score, keep, offset=0) -> mask``.
        attend: ``(q, k, v, mask, bias) -> [B, H, Q, D]``.
        prepare: ``(mask, q_len, k_len)``: makes the mask's schedule and leaves it with the mask;
            None if the backend has no such step of its own.
    """

    impl: str
    select: Select
    attend: Callable[[Tensor, Tensor, Tensor, Lifetimes, Tensor], Tensor]
    prepare: Callable[[Lifetimes, int, int], object] | None = None

    @classmethod
    def named(cls, impl: str) -> Engine:
        """Return dynmask's own functions with a named backend, never ``"auto"``."""

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Lifetimes, bias: Tensor) -> Tensor:
            return attention(q, k, v, mask, bias=bias, impl=impl)

        return cls(impl, _top, attend, _preparation(impl))

    def everything(self, inputs: Inputs, score: Tensor, bias: Tensor, keep: int) -> Tensor:
        """Select, schedule and attend, from the score; the query rows are the last ones."""
        q, k, v = inputs
        mask = self.select(score, keep, k.shape[2] - q.shape[2])
        return self.attend(q, k, v, mask, bias)


def engine_for(settings: Settings) -> Engine:
    """Return the engine that the settings name, ``"auto"`` being resolved on a small call.

    Raises:
        ValueError: If there is no such backend, or it cannot run such calls.
    """
    dtype = getattr(torch, settings.dtype)
    q, k = (
        torch.zeros(1, heads, 64, settings.dim, dtype=dtype, device=settings.device)
        for heads in (settings.heads, settings.groups)
    )
    q.requires_grad_(settings.benchmark == "backward")
    score = torch.zeros(1, settings.groups, 64, device=settings.device)
    mask = Lifetimes.top(score, keep=16)
    if settings.impl == "auto":
        return Engine.named(choose(q, k, k, mask, bias=score))
    reason = supports(settings.impl, q, k, k, mask, bias=score)
    if reason is not None:
        raise ValueError(f"impl {settings.impl} cannot run this: {reason}")
    return Engine.named(settings.impl)


def unused(mask: Lifetimes) -> Lifetimes:
    """Return an equal mask with no schedule yet: schedules are kept with the mask object."""
    return dataclasses.replace(mask)


def visible_pairs(mask: Lifetimes, heads: int) -> int:
    """Count the pairs of a row and a key that it sees, over all batch rows and query heads."""
    groups, count = mask.expiry.shape[1:]
    slot = torch.arange(count, device=mask.expiry.device)
    seen = (mask.expiry.clamp_max(count).long() - slot).clamp_min(0).sum()
    return int(seen) * (heads // groups)


def _top(score: Tensor, keep: int, offset: int = 0) -> Lifetimes:
    return Lifetimes.top(score, keep=keep, offset=offset)


def _preparation(impl: str) -> Callable[[Lifetimes, int, int], object] | None:
    if impl != "triton":
        return None
    backend = importlib.import_module("dynmask.ops.triton")
    prepare: Callable[[Lifetimes, int, int], object] | None = getattr(backend, "prepare", None)
    return prepare
