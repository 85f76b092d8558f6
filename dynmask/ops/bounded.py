"""The keys that a causal top-w still needs: at most w for each kv head, however long the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynmask.masks import Lifetimes
from dynmask.masks.lifetimes import HAS_TRITON, NEVER
from dynmask.ops.arguments import wants_gradients
from dynmask.ops.bounded_rules import (
    admitted,
    check_present,
    ending_with,
    insert_by_torch,
    rows_at,
    select,
)

STATE = ("k", "v", "score", "order", "expiry")


class BoundedKeys:
    """What later rows of a causal top-w can see, in ``W = keep`` slots for each kv head.

    A key's score does not depend on the query, so the set that a row keeps is the one before it
    plus its own key less at most one, and a key once evicted never returns: the kept keys are all
    that any later row needs. After any sequence of `insert` and `extend` the slots hold exactly the
    keys that ``Lifetimes.top`` of all scores, at once, shows the last row; the same bits of k, v
    and score. Scores are ranked as there: in float32, equal ones by arrival (the earlier wins), NaN
    as -inf, -0.0 as 0.0.

    The tensors below are changed in place and stay where they are in memory, and nothing waits for
    the device: `insert` and `view` can be captured in a CUDA graph. `reset` alone must be called
    and not replayed, and so must be the first `insert` or `extend` after it; what was captured when
    all slots were taken must be captured anew. `select_rows` and `to` make new tensors. Gradients
    do not flow into kept keys: a backward pass through them raises.

    Args:
        keep: ``W``, keys that a row sees; at least 1.
        batch: ``B``.
        groups: ``G``, kv heads.
        dim: ``D``.
        threshold: Keys whose score is lower, or NaN, are never admitted. None admits all.
        dtype: Of keys and values.
        device: Where they live.

    Attributes:
        k: ``[B, G, W, D]``, 0 in empty slots.
        v: ``[B, G, W, D]``, 0 in empty slots.
        score: ``[B, G, W]`` float32, 0 in empty slots.
        order: ``[B, G, W]`` int32, which key came earlier; -1 marks an empty slot.
        expiry: ``[B, G, W]`` int32, `Lifetimes` of one row: `NEVER`, 0 for an empty slot.

    Raises:
        ValueError: If ``keep < 1``.

    Source: arXiv 2508.02124 (DMA), whose decoding keeps the whole cache instead.
    """

    k: Tensor
    v: Tensor
    score: Tensor
    order: Tensor
    expiry: Tensor

    def __init__(
        self,
        keep: int,
        *,
        batch: int,
        groups: int,
        dim: int,
        threshold: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if not isinstance(keep, int):
            raise ValueError(f"keep={keep!r} must be an integer, a number of keys")
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1")
        self.keep = keep
        self.threshold = threshold
        slots = (batch, groups, keep)
        # Made in inference mode, they could not be written outside of it.
        with torch.inference_mode(False):
            self.k = torch.zeros(*slots, dim, dtype=dtype, device=device)
            self.v = torch.zeros_like(self.k)
            self.score = torch.zeros(slots, device=device)
            self.order = torch.full(slots, -1, dtype=torch.int32, device=device)
            self.expiry = torch.zeros(slots, dtype=torch.int32, device=device)
        self._placed()
        self._empty = True
        # Slots that are taken for sure in every head: known without asking the device.
        self._sure = 0
        self._cut = False

    def _placed(self) -> None:
        """Note what depends on where the tensors live; looked up once, not in every step."""
        batch, groups, _, dim = self.k.shape
        self._token = torch.Size((batch, groups, 1, dim))
        self._insert = _insert_function(self.k.device)

    def insert(self, k: Tensor, v: Tensor, score: Tensor, present: Tensor | None = None) -> None:
        """Take in one new token a batch row. On a GPU one kernel, nothing else.

        An empty slot is taken first; without one, the slot of the lowest score (among equal ones
        the latest arrival) is overwritten if the new score is higher.

        Args:
            k: ``[B, G, 1, D]``, any strides.
            v: ``[B, G, 1, D]``.
            score: ``[B, G, 1]`` float, compared in float32.
            present: ``[B]`` bool, False where the token is padding and is not taken in; None for
                all True.

        Raises:
            ValueError: If shapes, dtype or device are not those of this state.
        """
        if k.shape != self._token:
            self._refuse(k, one=True)
        self._check(k, v, score)
        if present is not None:
            check_present(present, k.shape[:1])
        self._insert(
            self.k,
            self.v,
            self.score,
            self.order,
            self.expiry,
            k,
            v,
            score,
            present,
            self.threshold,
        )
        self._count(1, present)

    def extend(
        self,
        k: Tensor,
        v: Tensor,
        score: Tensor,
        *,
        present: Tensor | None = None,
        commit: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Lifetimes]:
        """Take in a chunk of new tokens, and return what its rows attend to.

        ``Q`` query rows at the new tokens see under the mask what they would see under the
        ``Lifetimes.top`` of everything so far. Memory is linear in ``W + Q``. While nothing has
        been taken in, the chunk itself is returned, uncopied; later the kept keys by arrival
        (empty slots first), then the chunk.

        Args:
            k: ``[B, G, Q, D]``.
            v: ``[B, G, Q, D]``.
            score: ``[B, G, Q]`` float.
            present: ``[B, Q]`` bool, False for padding, anywhere; None for all True. Rows of
                padding see nothing before the first and behind the last real token.
            commit: False leaves the state as it was, and only looks ahead.

        Returns:
            ``k`` and ``v`` ``[B, G, K, D]``, ``score`` ``[B, G, K]`` float32, to be added to the
            logits, and the mask of those K keys; K is Q at first, ``W + Q`` later. Hidden keys are
            finite if all given ones are.

        Raises:
            ValueError: If shapes, dtype or device are not those of this state.
        """
        self._check(k, v, score)
        if present is not None:
            check_present(present, k.shape[::2])
        score = score.float()
        shown = admitted(score, present, self.threshold)
        first = 0
        if not self._empty:
            first = self.keep
            *kept, taken = self._by_arrival()
            new = (k, v, score)
            k, v, score = (torch.cat(pair, 2) for pair in zip(self._uncut(*kept), new, strict=True))
            if shown is not None or self._sure < self.keep:
                if shown is None:
                    shown = torch.ones_like(score[:, :, first:], dtype=torch.bool)
                shown = torch.cat([taken, shown], -1)
        mask = select(score, self.keep, shown, offset=first)
        if commit:
            self._store(k.detach(), v.detach(), score.detach(), mask.expiry >= k.shape[2])
            self._count(k.shape[2] - first, present)
        return k, v, score, ending_with(present, mask, first)

    def view(self, *, by_arrival: bool = False) -> tuple[Tensor, Tensor, Tensor, Lifetimes]:
        """Return what one row sees, the one of the token inserted last, until the next is inserted.

        Args:
            by_arrival: Return copies in order of arrival, empty slots first, instead of the slots
                themselves. A backend that gathers what a row sees (``impl="cpu"``) then computes
                the same bits as over the whole cache: same keys, same order of summation.

        Returns:
            ``k``, ``v``, ``score`` and the mask of their W slots.
        """
        if by_arrival:
            k, v, score, taken = self._by_arrival()
            expiry = torch.where(taken, NEVER, 0).int()
        else:
            k, v, score, expiry = self.k, self.v, self.score, self.expiry
        # A new mask each time: backends keep with a mask what they derive from it.
        k, v, score = self._uncut(k, v, score)
        full = self._sure == self.keep
        return k, v, score, Lifetimes._trusted(expiry, self.keep, is_causal=full)

    def reset(self) -> None:
        """Forget all keys; the tensors stay the same ones."""
        for name, empty in (("k", 0), ("v", 0), ("score", 0), ("order", -1), ("expiry", 0)):
            getattr(self, name).fill_(empty)
        self._empty, self._sure, self._cut = True, 0, False

    def select_rows(self, index: Tensor) -> None:
        """Replace the batch rows by those at ``index``, ``[B']`` integers; any number of them."""
        index = index.to(self.k.device)
        self._replace(lambda t: t.index_select(0, index))

    def to(self, device: torch.device | str) -> None:
        """Move the tensors, as caches are offloaded; from the CPU without waiting."""
        # What is on the CPU has arrived there.
        there = torch.device(device).type != "cpu"
        self._replace(lambda t: t.to(device, non_blocking=there))

    def _replace(self, function: Callable[[Tensor], Tensor]) -> None:
        with torch.inference_mode(False):
            for name in STATE:
                setattr(self, name, function(getattr(self, name)))
        self._placed()

    def memory(self) -> int:
        """Return the bytes of all tensors, empty slots included."""
        return sum(getattr(self, name).nbytes for name in STATE)

    def _check(self, k: Tensor, v: Tensor, score: Tensor) -> None:
        shape = k.shape
        if (
            len(shape) != 4
            or shape[0] != self._token[0]
            or shape[1] != self._token[1]
            or shape[3] != self._token[3]
            or shape[2] < 1
            or v.shape != shape
            or score.shape != shape[:3]
            or k.dtype != self.k.dtype
            or v.dtype != k.dtype
            or k.device != self.k.device
        ):
            self._refuse(k, v, score)
        if wants_gradients(k, v, score):
            self._cut = True

    def _refuse(self, k: Tensor, *others: Tensor, one: bool = False) -> None:
        batch, groups, _, dim = self._token
        raise ValueError(
            f"k must be [{batch}, {groups}, {'1' if one else 'Q'}, {dim}] {self.k.dtype} on "
            f"{self.k.device}, v the same and score [{batch}, {groups}, Q]; got "
            f"{[list(t.shape) for t in (k, *others)]} {k.dtype} on {k.device}: make new "
            "BoundedKeys for another model, batch size, dtype or device"
        )

    def _count(self, tokens: int, present: Tensor | None) -> None:
        self._empty = False
        if present is None and self.threshold is None:
            self._sure = min(self.keep, self._sure + tokens)

    def _by_arrival(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return copies of k, v and score in order of arrival, and which are keys, ``[B, G, W]``.

        Empty slots come first.
        """
        order, slot = self.order.sort(-1)
        k, v = rows_at(self.k, slot), rows_at(self.v, slot)
        return k, v, self.score.gather(2, slot), order >= 0

    def _store(self, k: Tensor, v: Tensor, score: Tensor, alive: Tensor) -> None:
        """Fill the slots with the keys ``alive [B, G, K]``, at most W a head, in their order."""
        slot = torch.arange(self.keep, dtype=torch.int32, device=k.device)
        seen = alive.cumsum(-1, dtype=torch.int32)
        taken = slot < seen[..., -1:]
        # The n-th key alive stands where their count reaches n.
        source = torch.searchsorted(seen, (slot + 1).expand_as(taken).contiguous())
        source = source.clamp_max(k.shape[2] - 1)
        # A key that is not there must be finite, and padding may be anything.
        self.k.copy_(rows_at(k, source).masked_fill_(~taken[..., None], 0))
        self.v.copy_(rows_at(v, source).masked_fill_(~taken[..., None], 0))
        self.score.copy_(score.gather(2, source).masked_fill_(~taken, 0))
        self.order.copy_(torch.where(taken, slot, -1))
        self.expiry.copy_(torch.where(taken, NEVER, 0))

    def _uncut(self, *kept: Tensor) -> tuple[Tensor, ...]:
        """Return kept tensors such that a backward pass that reaches them raises."""
        return without_gradient(*kept) if self._cut and torch.is_grad_enabled() else kept


def without_gradient(*kept: Tensor) -> tuple[Tensor, ...]:
    """Return the same tensors such that a backward pass that reaches them raises."""
    with torch.inference_mode(False):
        anchor = torch.empty(0, requires_grad=True)
    out: tuple[Tensor, ...] = _NoGradient.apply(anchor, *kept)
    return out


class _NoGradient(torch.autograd.Function):
    """The identity, with an error in place of a gradient that would be silently wrong."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in kept)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> None:
        raise ValueError(
            "gradients do not flow into the keys that a bounded cache kept from earlier calls: "
            "train with the whole sequence in one call, or without a cache"
        )


def _insert_function(device: torch.device) -> Callable[..., None]:
    if device.type == "cuda" and HAS_TRITON:
        from dynmask.ops.triton.insert import insert

        return insert
    return insert_by_torch
