"""RULER's frequent words as training documents, in the words of `dynmask.eval.frequent`."""

from __future__ import annotations

import itertools
import random
import string

import numpy as np

from dynmask.eval import frequent
from dynmask.train.templates import Piece, TemplateWriter
from dynmask.train.templates_hay import Weights, made_up

_ALPHA = (1.6, 2.4)
_LETTERS = 6


class FrequentWords:
    """Writes coded texts; their words are random letters, none of them the evaluation's.

    Args:
        write: of the tokenizer.
        weights: of answers, and of the words of the text.
    """

    def __init__(self, write: TemplateWriter, weights: Weights) -> None:
        self._write, self._weights = write, weights
        draft = frequent.frequent_draft(length=512, rng=random.Random(0))
        # The header's last space belongs to the first word.
        self._head = write.pieces(draft.header.rstrip(" "))
        self._question = write.pieces(draft.questions[0].text)

    def pieces(self, rng: np.random.Generator, size: int) -> list[Piece] | None:
        """A text of up to ``size`` tokens, its question and answer; None if there is no room.

        Ranks fall as ``rank ** -alpha`` with an alpha around RULER's 2. The answer gives the words
        of rank 2 to 4 from the most frequent on; their counts differ, and from rank 5's too.
        """
        vocabulary = max(size // 50, frequent.GOLD + 2) - 1
        names = itertools.islice(made_up(rng, string.ascii_lowercase, _LETTERS), vocabulary)
        spaced = [self._write.ids(text) for text in (" ...", *(f" {name}" for name in names))]
        gold = spaced[1 : 1 + frequent.GOLD]
        fixed = sum(len(ids) for ids, _ in (*self._head, *self._question))
        room = size - fixed - sum(map(len, gold))
        shares = np.arange(1, len(spaced) + 1) ** -rng.uniform(*_ALPHA)
        costs = np.array([len(ids) for ids in spaced])
        counts = _counts(shares / shares.sum(), costs, room)
        if counts is None or len(set(counts[1 : frequent.GOLD + 2])) <= frequent.GOLD:
            return None
        order = rng.permutation(np.repeat(np.arange(len(spaced)), counts))
        coded = [token for index in order for token in spaced[index]]
        answer: list[Piece] = [(ids, self._weights.answer) for ids in gold]
        # Which word comes next is random, but each is one of few: more than noise.
        return [*self._head, (coded, self._weights.key), *self._question, *answer]


def _counts(shares: np.ndarray, costs: np.ndarray, room: int) -> list[int] | None:
    """How often each word stands in as many words as fit into ``room`` tokens."""
    low, high = 0, max(room, 0)
    while low < high:
        middle = (low + high + 1) // 2
        fits = int(((shares * middle).astype(int) * costs).sum()) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    counts = (shares * low).astype(int)
    return counts.tolist() if counts.any() else None
