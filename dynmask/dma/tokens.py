"""Tokens as a layer's cache holds them: keys, values, scores, and which are padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynmask.ops.bounded_rules import rows_at


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of one layer, padding included.

    Attributes:
        k: ``[B, G, N, D]``.
        v: ``[B, G, N, D]``.
        score: ``[B, G, N]`` float32.
        present: ``[B, N]`` bool, False for padding, or None for all True.
    """

    k: Tensor
    v: Tensor
    score: Tensor
    present: Tensor | None

    def __len__(self) -> int:
        return self.k.shape[2]

    def __add__(self, new: Tokens) -> Tokens:
        both = self.before(new)
        if self.present is None and new.present is None:
            return both
        return replace(both, present=torch.cat([self.real(), new.real()], 1))

    def before(self, new: Tokens) -> Tokens:
        """Return these and then the new ones, without a word on which are padding."""
        pairs = (self.k, new.k), (self.v, new.v), (self.score, new.score)
        k, v, score = (torch.cat(pair, 2) for pair in pairs)
        return Tokens(k, v, score, None)

    def real(self) -> Tensor:
        """Return ``present``, made if it is None."""
        if self.present is not None:
            return self.present
        return torch.ones(len(self.k), len(self), dtype=torch.bool, device=self.k.device)

    def first(self, count: int) -> Tokens:
        """Return the first so many, not copied."""
        return self._at(slice(count))

    def split(self, count: int) -> tuple[Tokens, Tokens]:
        """Return the first so many and the others, not copied."""
        return self._at(slice(count)), self._at(slice(count, None))

    def _at(self, at: slice) -> Tokens:
        present = None if self.present is None else self.present[:, at]
        return Tokens(self.k[:, :, at], self.v[:, :, at], self.score[:, :, at], present)

    def padding_first(self) -> Tokens:
        """Return each batch row's padding and then its real tokens, in their order."""
        if self.present is None:
            return self
        present, slot = self.present.sort(dim=-1, stable=True)
        slot = slot[:, None].expand(self.score.shape)
        k, v = rows_at(self.k, slot), rows_at(self.v, slot)
        return Tokens(k, v, self.score.gather(2, slot), present)

    def each(self, function: Callable[[Tensor], Tensor]) -> Tokens:
        """Return them with every tensor replaced."""
        present = None if self.present is None else function(self.present)
        return Tokens(function(self.k), function(self.v), function(self.score), present)

    def memory(self) -> int:
        """Return the bytes of all tensors."""
        return sum(t.nbytes for t in vars(self).values() if t is not None)
