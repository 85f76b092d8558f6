"""Multi-query associative recall: pairs of key and value, then keys again, each to be answered.

A row is ``k1 v1 ... kn vn``, then filler in which every key stands once more, its value after it.
Only these values are trained and scored; all other tokens weigh 0.

Source: the task of arXiv 2312.04927, with two changes for long rows. Filler has ids of its own:
random ids would repeat keys and contradict a fifth of the questions at 8K tokens. And questions
stand anywhere with equal chance by default, where the original puts most of them near the pairs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dynmask.train.source import Batch, Step


@dataclass(frozen=True)
class Mqar:
    """Synthetic associative recall; it needs no text and no tokenizer.

    Attributes:
        vocab: ids of keys (1 to ``vocab / 2 - 1``) and values (``vocab / 2`` on); id 0 is unused.
        pairs: key-value pairs of a row; a quarter of the row's tokens at most, since each pair
            takes two tokens and its question two more.
        fewest: the pairs of each step's rows are drawn, with equal chance, from ``fewest`` to what
            ``pairs`` allows: with few of them the task is learned sooner; None for always as many.
        filler: ids after ``vocab`` that fill the rest.
        power: questions stand in gap ``i`` with a chance proportional to ``i ** (power - 1)``.

    Raises:
        ValueError: a value is out of its range.
    """

    type: ClassVar[str] = "mqar"
    shortest: ClassVar[int] = 16
    """Tokens of the shortest row of a recipe: with 2 to 4 pairs a model learns to bind them."""

    vocab: int = 8192
    pairs: int = 512
    filler: int = 64
    power: float = 1.0
    fewest: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= self.vocab // 2 - 1:
            raise ValueError(
                f"data: pairs={self.pairs} must be from 1 to {self.vocab // 2 - 1}, the keys that "
                f"vocab={self.vocab} has"
            )
        if self.fewest is not None and not 1 <= self.fewest <= self.pairs:
            raise ValueError(
                f"data: fewest={self.fewest} must be from 1 to pairs={self.pairs}, or left out"
            )
        if self.filler < 1 or self.power <= 0:
            raise ValueError(f"data: filler={self.filler} and power={self.power} must be over 0")

    @property
    def vocab_size(self) -> int:
        """Ids in all."""
        return self.vocab + self.filler


class Recall:
    """Makes rows of `Mqar`, each batch from ``(seed, number of the step)`` alone.

    Args:
        data: the task.
    """

    kinds = ("mqar",)
    answer = 1.0

    def __init__(self, data: Mqar) -> None:
        self.data = data

    def require(self, tokens: int) -> None:
        """Raise unless a row of so many tokens holds a pair and its question.

        Raises:
            ValueError: it does not.
        """
        if tokens < 4:
            raise ValueError(f"data: a row of {tokens} tokens has no room for a pair; 4 are needed")

    def sha256(self) -> str:
        """Digest of the task."""
        return hashlib.sha256(repr(self.data).encode()).hexdigest()

    def at(self, step: Step) -> Batch:
        """The batch of a step."""
        rng = np.random.default_rng((step.seed, step.number))
        data, rows, length = self.data, step.rows, step.length
        pairs = min(data.pairs, length // 4)
        if data.fewest is not None:
            pairs = int(rng.integers(min(data.fewest, pairs), pairs + 1))
        half = data.vocab // 2
        keys = 1 + _subset(rng, rows, half - 1, pairs)
        values = rng.integers(half, data.vocab, (rows, pairs))
        ids = rng.integers(data.vocab, data.vocab_size, (rows, length))
        ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
        gaps = (length - 2 * pairs) // 2
        chances = np.broadcast_to((data.power - 1) * np.log(np.arange(1, gaps + 1)), (rows, gaps))
        asked = 2 * pairs + 2 * _draw(rng, chances, pairs)
        np.put_along_axis(ids, asked, keys, axis=1)
        np.put_along_axis(ids, asked + 1, values, axis=1)
        weights = np.zeros((rows, length), dtype=np.float32)
        np.put_along_axis(weights, asked + 1, self.answer, axis=1)
        return Batch(ids, weights, kinds=np.zeros(rows, dtype=np.int64))


def _subset(rng: np.random.Generator, rows: int, many: int, count: int) -> np.ndarray:
    """Draw ``count`` of ``many`` in each row without replacement, each order as likely.

    Floyd's algorithm, which looks at no more numbers than it draws: most keys are in few rows.
    """
    drawn = np.empty((rows, count), dtype=np.int64)
    for place, last in enumerate(range(many - count, many)):
        number = rng.integers(0, last + 1, rows)
        known = (drawn[:, :place] == number[:, None]).any(axis=1)
        drawn[:, place] = np.where(known, last, number)
    return rng.permuted(drawn, axis=1)


def _draw(rng: np.random.Generator, log_chances: np.ndarray, count: int) -> np.ndarray:
    """Draw ``count`` indices of each row without replacement, in order.

    The largest of log-chance plus Gumbel noise are such a draw.
    """
    noisy = log_chances + rng.gumbel(size=log_chances.shape)
    best = np.argpartition(-noisy, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(noisy, best, axis=1), axis=1)
    return np.take_along_axis(best, order, axis=1)
