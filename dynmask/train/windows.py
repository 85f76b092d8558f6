"""Running text as training data: windows of a corpus in a shuffled order, documents kept apart."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from dynmask.train.corpus import Corpus
from dynmask.train.source import Batch, Step


class Windows:
    """Cuts a corpus into windows; an epoch takes each once, in an order drawn from the seed.

    Each epoch starts at another offset, so that the cuts fall elsewhere. Every phase starts anew.

    Args:
        corpus: tokenised text.
        end: id of the token that closes a document.
        packed: the documents in a window do not see each other, and no document's first token is
            predicted; otherwise a window is one sequence.
    """

    kinds: tuple[str, ...] = ()
    answer: float | None = None

    def __init__(self, corpus: Corpus, end: int, *, packed: bool) -> None:
        self.corpus, self.end, self.packed = corpus, end, packed

    def require(self, tokens: int) -> None:
        """Raise ValueError unless a window of so many tokens can be cut."""
        self.corpus.require(tokens)

    def sha256(self) -> str:
        """Digest of the text."""
        return self.corpus.sha256()

    def count(self, length: int) -> int:
        """Windows of an epoch, whatever its offset."""
        return max(1, len(self.corpus.tokens) // length - 1)

    def at(self, step: Step) -> Batch:
        """The batch of a step."""
        self.require(step.length)
        count = self.count(step.length)
        slack = len(self.corpus.tokens) - count * step.length
        ids = np.empty((step.rows, step.length), dtype=np.int64)
        for row in range(step.rows):
            epoch, number = divmod(step.within * step.rows + row, count)
            seed = (step.seed, step.phase, epoch)
            offset, order = _epoch(seed, count, min(slack, step.length))
            start = offset + int(order[number]) * step.length
            ids[row] = self.corpus.tokens[start : start + step.length]
        weights = np.ones(ids.shape, dtype=np.float32)
        if not self.packed:
            return Batch(ids, weights)
        documents = np.zeros_like(ids)
        first = ids[:, :-1] == self.end
        np.cumsum(first, axis=1, out=documents[:, 1:])
        weights[:, 1:][first] = 0.0
        return Batch(ids, weights, documents=documents)


@lru_cache(maxsize=2)
def _epoch(seed: tuple[int, int, int], count: int, slack: int) -> tuple[int, np.ndarray]:
    """Where an epoch's first window starts, and the order of its windows."""
    rng = np.random.default_rng(seed)
    return int(rng.integers(0, slack + 1)), rng.permutation(count)
