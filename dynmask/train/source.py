"""What every kind of data offers: the batch of a step, drawn from seed and number alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Step:
    """Which batch of a run.

    Attributes:
        number: optimizer step of the run, from 0.
        phase: the phase it belongs to, from 0.
        within: optimizer step of that phase, from 0.
        rows: sequences in the batch.
        length: tokens of each.
        seed: of the run.
    """

    number: int
    phase: int
    within: int
    rows: int
    length: int
    seed: int


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences with the weights of their tokens.

    Attributes:
        ids: ``[rows, length]`` int64.
        weights: ``[rows, length]`` fp32; a weight stands at the token whose prediction it weighs.
        kinds: ``[rows]``, an index into the source's ``kinds``; None if it has none.
        documents: ``[rows, length]``, the document of each token, counted from 0 in each row; None
            if a row is one document. Documents do not see each other.
    """

    ids: np.ndarray
    weights: np.ndarray
    kinds: np.ndarray | None = None
    documents: np.ndarray | None = None


class Source(Protocol):
    """Training or held-out data."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds of sequences whose answers are scored."""

    @property
    def answer(self) -> float | None:
        """The weight that marks an answer; None if there are no answers."""

    def at(self, step: Step) -> Batch:
        """The batch of a step; equal for an equal step, whatever was asked before."""

    def require(self, tokens: int) -> None:
        """Raise ValueError unless sequences of so many tokens can be made."""

    def sha256(self) -> str:
        """Digest: equal for equal data."""
