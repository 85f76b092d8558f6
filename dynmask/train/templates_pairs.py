"""Key-value objects as training documents, in the words of `dynmask.eval.keyvalue`.

Keys of numbers are those of the four digits that `is_eval_word` leaves to training; keys of words
are training words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dynmask.eval.keyvalue import make_stores, pair_answer, pair_question
from dynmask.eval.words import is_eval_word
from dynmask.train.templates import Piece, TemplateWriter, length
from dynmask.train.templates_hay import Weights
from dynmask.train.templates_niah import random_uuid

SHARES = {"digits": 0.5, "words": 0.3, "hex": 0.12, "uuid": 0.08}
"""How often each form is drawn: the evaluation's, and keys and values of eight hex digits."""

_TRAINING_NUMBERS = [n for n in range(1000, 10_000) if not is_eval_word(str(n))]


class KeyValue:
    """Writes objects of pairs, then questions for the values of keys.

    Args:
        write: of the tokenizer.
        words: keys are made of.
        weights: of answers, of numbers and of keys of words.
    """

    def __init__(self, write: TemplateWriter, words: Sequence[str], weights: Weights) -> None:
        self._write, self._words, self._weights = write, words, weights
        (store,) = make_stores(pairs=2, n=1, questions=1, seed=0, form="digits")
        header = store.text.partition("{")[0]
        self._open = write.pieces(header + '{"')
        self._between = write.pieces('": "'), write.pieces('",\n "'), write.pieces('"}')
        self._question = pair_question("{key}")

    def pieces(self, rng: np.random.Generator, size: int, *, questions: int) -> list[Piece] | None:
        """An object and so many questions in ``size`` tokens; None if there is no room."""
        form = str(rng.choice(list(SHARES), p=list(SHARES.values())))
        inner, after, close = self._between
        key_weight = self._weights.key if form == "words" else self._weights.noise
        asked_each = {"uuid": 100, "hex": 50}.get(form, 36)
        room = size - length(self._open) - length(close)
        questions = max(1, min(questions, room // (2 * asked_each)))
        room -= asked_each * questions
        body: list[Piece] = []
        seen: list[tuple[list[int], list[int]]] = []
        for key, value in self._facts(rng, form):
            line = [
                *(after if seen else []),
                (key, key_weight),
                *inner,
                (value, self._weights.noise),
            ]
            room -= length(line)
            if room < 0:
                break
            seen.append((key, value))
            body += line
        if len(seen) < 2:
            return None
        pieces = [*self._open, *body, *close]
        for index in rng.permutation(len(seen))[:questions]:
            pieces += self._asked(*seen[index], key_weight=key_weight)
        return pieces

    def _asked(self, key: list[int], value: list[int], *, key_weight: float) -> list[Piece]:
        before, after = self._question.split("{key}")
        write = self._write
        # The evaluation's answer starts with a space and a quote, and ends with a quote.
        lead, close = pair_answer("{value}").split("{value}")
        return [
            *write.pieces(before),
            (key, key_weight),
            *write.pieces(after),
            *write.pieces(lead),
            (value, self._weights.answer),
            *write.pieces(close),
        ]

    def _facts(self, rng: np.random.Generator, form: str) -> Iterator[tuple[list[int], list[int]]]:
        """Keys and values, none twice; without end, save for numbers of four digits."""
        write = self._write
        if form in ("digits", "words"):
            numbers = rng.permutation(np.arange(1000, 10_000))
            keys = rng.permutation(np.array(_TRAINING_NUMBERS))[: len(_TRAINING_NUMBERS) // 2]
            # A number is a key or a value.
            taken = set(keys.tolist()) if form == "digits" else set()
            values = (write.number(n) for n in numbers.tolist() if n not in taken)
            names = self._word_keys(rng) if form == "words" else map(write.number, keys.tolist())
            yield from zip(names, values, strict=False)
            return
        seen: set[str] = set()
        while True:
            key, value = (
                random_uuid(rng) if form == "uuid" else rng.bytes(4).hex() for _ in range(2)
            )
            if not {key, value} & seen:
                seen |= {key, value}
                yield write.ids(key), write.ids(value)

    def _word_keys(self, rng: np.random.Generator) -> Iterator[list[int]]:
        seen: set[tuple[int, ...]] = set()
        while True:
            first, second = (self._words[int(i)] for i in rng.integers(0, len(self._words), 2))
            key = self._write.key(first, second).bare
            if key not in seen:
                seen.add(key)
                yield list(key)
