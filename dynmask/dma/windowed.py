"""The keys that a causal top-w with a window still needs: the nearest, and the best before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynmask.dma.nearest import select_with_nearest
from dynmask.dma.tokens import Tokens
from dynmask.masks import Lifetimes
from dynmask.masks.lifetimes import NEVER
from dynmask.ops.arguments import wants_gradients
from dynmask.ops.bounded import BoundedKeys, without_gradient
from dynmask.ops.bounded_rules import admitted, ending_with


def kept_keys(keep: int, window: int, **shape: Any) -> BoundedKeys | WindowedKeys:
    """Return what keeps ``keep`` keys, the ``window`` nearest among them.

    Args:
        keep: ``W``, at least 1.
        window: From 0 to ``keep``.
        shape: As for `BoundedKeys`.
    """
    return WindowedKeys(keep, window, **shape) if window else BoundedKeys(keep, **shape)


class WindowedKeys:
    """What `BoundedKeys` is to `Lifetimes.top`, for `select_with_nearest`: at most ``keep`` keys.

    The last ``window`` real tokens of each batch row wait outside the choice. A new one pushes the
    oldest of them into it: `BoundedKeys` of ``keep - window`` slots, or nowhere if there are none.

    Args:
        keep: ``W``, keys that a row sees.
        window: Nearest keys of each row; from 1 to ``keep``.
        batch: ``B``.
        groups: ``G``, kv heads.
        dim: ``D``.
        threshold: Keys whose score is lower, or NaN, are not chosen. None lets all be.
        dtype: Of keys and values.
        device: Where they live.

    Attributes:
        chosen: The older keys; None if all that a row sees are near.
        near: The last tokens, each batch row's padding first; None before any.
    """

    def __init__(
        self,
        keep: int,
        window: int,
        *,
        batch: int,
        groups: int,
        dim: int,
        threshold: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.keep, self.window, self.threshold = keep, window, threshold
        self.chosen: BoundedKeys | None = None
        if window < keep:
            self.chosen = BoundedKeys(
                keep - window,
                batch=batch,
                groups=groups,
                dim=dim,
                threshold=threshold,
                dtype=dtype,
                device=device,
            )
        self.near: Tokens | None = None
        self._cut = False

    def insert(self, k: Tensor, v: Tensor, score: Tensor, present: Tensor | None = None) -> None:
        """Take in one new token a batch row.

        Args:
            k: ``[B, G, 1, D]``.
            v: ``[B, G, 1, D]``.
            score: ``[B, G, 1]`` float.
            present: ``[B]`` bool, False where the token is padding; None for all True.
        """
        self._take_in(Tokens(k, v, score.float(), None if present is None else present[:, None]))

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

        Args:
            k: ``[B, G, Q, D]``.
            v: ``[B, G, Q, D]``.
            score: ``[B, G, Q]`` float.
            present: ``[B, Q]`` bool, False for padding, anywhere; None for all True.
            commit: False leaves the state as it was, and only looks ahead.

        Returns:
            As `BoundedKeys.extend`: what was given, or behind the chosen keys by arrival and the
            nearest ones.
        """
        new = Tokens(k, v, score.float(), present)
        tokens = new if self.near is None else self._near() + new
        shown = admitted(tokens.score, tokens.present, self.threshold)
        there = None if tokens.present is None else tokens.present[:, None]
        attended, kept = tokens, 0
        if self.chosen is not None and self.near is not None:
            older, mask = self._older(by_arrival=True)
            attended, kept = older.before(tokens), self.chosen.keep
            if shown is not None or not mask.is_causal:
                taken = mask.expiry > 0
                there = tokens.real()[:, None].expand(*taken.shape[:2], -1)
                shown = torch.cat([taken, there if shown is None else shown], -1)
                there = torch.cat([taken, there], -1)
        first = len(attended) - len(new)
        seen = select_with_nearest(
            attended.score,
            self.keep,
            self.window,
            shown=shown,
            there=there,
            kept=kept,
            offset=first,
        )
        if commit:
            self._take_in(new)
        return attended.k, attended.v, attended.score, ending_with(present, seen, first)

    def view(self, *, by_arrival: bool = False) -> tuple[Tensor, Tensor, Tensor, Lifetimes]:
        """Return what one row sees, the one of the token inserted last, until the next is inserted.

        Args:
            by_arrival: As in `BoundedKeys.view`; the nearest keys stand last, in order.

        Returns:
            ``k``, ``v``, ``score`` and the mask of their slots, at most W.
        """
        tokens = self._near()
        expiry = torch.where(tokens.real(), NEVER, 0).int()[:, None].expand(tokens.score.shape)
        is_causal = tokens.present is None
        if self.chosen is not None:
            older, mask = self._older(by_arrival=by_arrival)
            tokens = older.before(tokens)
            expiry = torch.cat([mask.expiry, expiry], -1)
            is_causal = is_causal and mask.is_causal
        seen = Lifetimes._trusted(expiry, self.keep, is_causal=is_causal)
        return tokens.k, tokens.v, tokens.score, seen

    def select_rows(self, index: Tensor) -> None:
        """Replace the batch rows by those at ``index``, ``[B']`` integers; any number of them."""
        if self.chosen is not None:
            self.chosen.select_rows(index)
        if self.near is not None:
            self.near = self.near.each(lambda t: t.index_select(0, index.to(t.device)))

    def to(self, device: torch.device | str) -> None:
        """Move the tensors, as caches are offloaded; from the CPU without waiting."""
        if self.chosen is not None:
            self.chosen.to(device)
        if self.near is not None:
            # What is on the CPU has arrived there.
            there = torch.device(device).type != "cpu"
            self.near = self.near.each(lambda t: t.to(device, non_blocking=there))

    def memory(self) -> int:
        """Return the bytes of all tensors."""
        return sum(part.memory() for part in (self.chosen, self.near) if part is not None)

    def _near(self) -> Tokens:
        assert self.near is not None
        return self._uncut(self.near)

    def _older(self, *, by_arrival: bool) -> tuple[Tokens, Lifetimes]:
        assert self.chosen is not None
        k, v, score, mask = self.chosen.view(by_arrival=by_arrival)
        return self._uncut(Tokens(k, v, score, None)), mask

    def _uncut(self, kept: Tokens) -> Tokens:
        """Return kept tokens such that a backward pass that reaches them raises."""
        if not (self._cut and torch.is_grad_enabled()):
            return kept
        k, v, score = without_gradient(kept.k, kept.v, kept.score)
        return Tokens(k, v, score, kept.present)

    def _take_in(self, new: Tokens) -> None:
        """Push the tokens into the window, and what leaves it into the choice."""
        if wants_gradients(new.k, new.v, new.score):
            self._cut = True
        present = new.present
        tokens = Tokens(new.k.detach(), new.v.detach(), new.score.detach(), present)
        if self.near is not None:
            tokens = self.near + tokens
        tokens = tokens.padding_first()
        leave = max(0, len(tokens) - self.window)
        older, near = tokens.split(leave)
        # Of a chunk, which would else be held with them.
        self.near = near.each(torch.clone) if leave > 1 else near
        if self.chosen is None or not leave:
            return
        if leave > 1:
            self.chosen.extend(older.k, older.v, older.score, present=older.present)
        else:
            real = None if older.present is None else older.present[:, 0]
            self.chosen.insert(older.k, older.v, older.score, real)
