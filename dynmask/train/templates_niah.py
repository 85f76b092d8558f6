"""RULER's needles as training documents, in the words of `dynmask.eval.niah`.

Keys are made of training words, so none is the evaluation's. Answers give several values in the
order of the text, and values of several keys in the order of the question: each is the only right
one.
"""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from collections.abc import Iterator, Sequence

import numpy as np

from dynmask.eval import niah
from dynmask.train.templates import Key, Piece, TemplateWriter
from dynmask.train.templates_hay import Draft, Weights, several

SHARES = {
    "multivalue": 0.25,
    "multiquery": 0.25,
    "multikey": 0.12,
    "multikey_2": 0.22,
    "single_1": 0.08,
    "single_3": 0.04,
    "multikey_3": 0.04,
}
"""How often each of `dynmask.eval.niah.NIAH` is drawn."""

_MOST_QUESTIONS = 24


@dataclasses.dataclass(frozen=True)
class Fact:
    """A key with one of its values, whose ids are those after a space.

    A space joins the letter that a UUID may start with.
    """

    key: Key
    value: list[int]


class Niah:
    """Writes documents with needles.

    Args:
        write: of the tokenizer.
        words: keys are made of.
        weights: of answers, numbers and keys.
    """

    def __init__(self, write: TemplateWriter, words: Sequence[str], weights: Weights) -> None:
        self._write, self._words, self._weights = write, words, weights

    def draft(self, rng: np.random.Generator, size: int) -> Draft:
        """A document of one of RULER's tasks, for ``size`` tokens.

        Several questions share a hay, each with needles of its own; as many as fit in half of it.
        """
        name = str(rng.choice(list(SHARES), p=list(SHARES.values())))
        rule = niah.NIAH[name]
        # Fewer values and keys than RULER's 4, too, so that a model learns to stop.
        if rule.values > 1:
            rule = dataclasses.replace(rule, values=int(rng.integers(2, 5)))
        if rule.asked > 1:
            count = int(rng.integers(2, 5))
            rule = dataclasses.replace(rule, keys=count, asked=count)
        each = rule.keys * rule.values * (90 if rule.uuid_values else 30) + 60
        most = max(1, min(_MOST_QUESTIONS, size // (2 * each)))
        return self._draft(rng, rule, int(rng.integers(1, most + 1)))

    def _draft(self, rng: np.random.Generator, rule: niah.Niah, questions: int) -> Draft:
        keys, values = self._keys(rng, rule), self._values(rng, rule)
        facts = [
            [Fact(key, next(values)) for _ in range(rule.values)]
            for key in itertools.islice(keys, questions * rule.keys)
        ]
        order = rng.permutation(len(facts) * rule.values)
        flat = [fact for of_key in facts for fact in of_key]
        # The values of a key in the order in which the text gives them.
        place = {id(flat[index]): at for at, index in enumerate(order)}
        asked: list[Piece] = []
        for first in range(0, len(facts), rule.keys):
            chosen = facts[first : first + rule.asked]
            ordered = [sorted(of_key, key=lambda f: place[id(f)]) for of_key in chosen]
            asked += self._asked(rule, ordered)
        lead = " " if rule.hay == "book" else ""
        needle = lead + niah.needle(rule, "{key}", "{value}").replace(" {value}", "{value}")
        hay: Iterator[list[Piece]] | None = None
        if rule.hay == "noise":
            hay = itertools.repeat([(self._write.ids(niah.NOISE), 1.0)])
        elif rule.hay == "needles":
            fresh = (Fact(key, value) for key, value in zip(keys, values, strict=False))
            hay = (self._needle(needle, fact) for fact in fresh)
        return Draft(
            head=self._write.pieces(niah.header(rule)),
            hidden=[self._needle(needle, flat[index]) for index in order],
            asked=asked,
            hay=hay,
        )

    def _needle(self, template: str, fact: Fact) -> list[Piece]:
        weights = self._weights
        return self._write.pieces(
            template, fact.key, fact.value, key_weight=weights.key, value_weight=weights.noise
        )

    def _asked(self, rule: niah.Niah, facts: list[list[Fact]]) -> list[Piece]:
        """A question for the keys of ``facts`` and its answer, which ends with a full stop."""
        weights, write = self._weights, self._write
        keys = [of_key[0].key for of_key in facts]
        pieces: list[Piece] = []
        # The question says its keys twice; only the first time are they any keys at all.
        for part, text in enumerate(niah.question(rule, "{key}").split(" {key}")):
            if part:
                weight = weights.key if part == 1 else 1.0
                pieces += several(write, [list(key.spaced) for key in keys], weight)
            pieces += write.pieces(text)
        values = [fact.value for of_key in facts for fact in of_key]
        return [*pieces, *several(write, values, weights.answer), (write.ids("."), 1.0)]

    def _keys(self, rng: np.random.Generator, rule: niah.Niah) -> Iterator[Key]:
        """Keys without end, none twice."""
        seen: set[Key] = set()
        while True:
            if rule.uuid_keys:
                text = random_uuid(rng)
                key = Key(tuple(self._write.ids(f" {text}")), tuple(self._write.ids(text)))
            else:
                first, second = (self._words[int(i)] for i in rng.integers(0, len(self._words), 2))
                key = self._write.key(first, second)
            if key not in seen:
                seen.add(key)
                yield key

    def _values(self, rng: np.random.Generator, rule: niah.Niah) -> Iterator[list[int]]:
        """Values without end, none twice."""
        seen: set[int] = set()
        while True:
            if rule.uuid_values:
                yield self._write.ids(f" {random_uuid(rng)}")
                continue
            number = int(rng.integers(1_000_000, 10_000_000))
            if number not in seen:
                seen.add(number)
                yield [*self._write.ids(" "), *self._write.number(number)]


def random_uuid(rng: np.random.Generator) -> str:
    """A random UUID as text."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))
