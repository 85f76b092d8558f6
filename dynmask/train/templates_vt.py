"""RULER's variable tracking as training documents, in the words of `dynmask.eval.tracking`.

Names are random letters, none of them the evaluation's.
"""

from __future__ import annotations

import itertools
import random
import string

import numpy as np

from dynmask.eval import tracking
from dynmask.eval.niah import NOISE
from dynmask.train.templates import Piece, TemplateWriter
from dynmask.train.templates_hay import Draft, Weights, in_lines, made_up

_MOST_CHAINS = 10
_FIRST, _ = tracking.assignments("{value}", ["{key}", ""])
_, _SECOND = tracking.assignments("", ["{value}", "{key}"])
# The value of a later line is a name, which takes the space before it.
_LATER = _SECOND.replace(" {value}", "{value}")
_EXAMPLE_LINES = (2, 10)


class VariableTracking:
    """Writes documents with chains of assignments.

    Args:
        write: of the tokenizer.
        weights: of answers, and of names and numbers where they are first written.
    """

    def __init__(self, write: TemplateWriter, weights: Weights) -> None:
        self._write, self._weights = write, weights
        draft = tracking.tracking_draft(questions=1, rng=random.Random(0))
        # The evaluation's own example, whose names are not ours, follows the wording.
        wording = draft.header[: draft.header.index("\n\n") + 2]
        self._header = write.pieces(wording)
        self._noise: list[Piece] = [(write.ids(NOISE), 1.0)]

    def draft(self, rng: np.random.Generator, size: int) -> Draft:
        """A document for ``size`` tokens, with the evaluation's worked example if there is room."""
        questions = int(rng.integers(1, max(1, min(_MOST_CHAINS, size // 320 - 1)) + 1))
        head = list(self._header)
        if size >= 1024 and rng.random() < 0.75:
            head = [*self._example(rng), *head]
        values = rng.choice(90_000, questions, replace=False) + 10_000
        names = made_up(rng, string.ascii_uppercase, 5)
        chains = [list(itertools.islice(names, tracking.HOPS + 1)) for _ in range(questions)]
        lines = [self._lines(chain, int(v)) for chain, v in zip(chains, values, strict=True)]
        # Chains run beside each other, each in its own order.
        turns = rng.permutation(np.repeat(np.arange(questions), tracking.HOPS + 1))
        left = [iter(of_chain) for of_chain in lines]
        asked: list[Piece] = []
        for index in rng.permutation(questions):
            asked += self._asked(chains[index], int(values[index]))
        return Draft(
            head, [next(left[turn]) for turn in turns], asked, itertools.repeat(self._noise)
        )

    def _lines(self, chain: list[str], value: int) -> list[list[Piece]]:
        """The assignments of a chain: names are random where they are new."""
        noise = self._weights.noise
        spaced = [self._write.ids(f" {name}") for name in chain]
        new = [self._write.key(name) for name in chain]
        number = self._write.number(value)
        first = self._write.pieces(_FIRST, new[0], number, key_weight=noise, value_weight=noise)
        return [first] + [
            self._write.pieces(_LATER, key, before, key_weight=noise)
            for before, key in zip(spaced, new[1:], strict=False)
        ]

    def _asked(self, chain: list[str], value: int) -> list[Piece]:
        """The question for a chain and its answer, the names in their order."""
        weights, write = self._weights, self._write
        question = tracking.tracking_question("{value}")
        answer: list[Piece] = [(write.ids(f" {name}"), weights.answer) for name in chain]
        number = write.number(value)
        return [*write.pieces(question, value=number, value_weight=weights.key), *answer]

    def _example(self, rng: np.random.Generator) -> list[Piece]:
        names = made_up(rng, string.ascii_uppercase, 3)
        chain = list(itertools.islice(names, tracking.HOPS + 1))
        value = int(rng.integers(10_000, 100_000))
        noise = int(rng.integers(_EXAMPLE_LINES[0], _EXAMPLE_LINES[1] + 1))
        hay = itertools.repeat(self._noise)
        lines = in_lines(
            rng,
            self._write,
            hay,
            self._lines(chain, value),
            room=noise * (len(self._noise[0][0]) + 1),
        )
        return [
            *self._header,
            *lines,
            *self._asked(chain, value),
            (self._write.ids("\n\n"), 1.0),
        ]
