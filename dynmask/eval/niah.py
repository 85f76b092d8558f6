"""RULER's needles in a haystack: one or more values of one or more keys.

Source: NVIDIA/RULER (Apache-2.0), task `niah`, in its template for base models. Here the hay of
"essays" is a book, keys are two evaluation words, needles are drawn one from each of equal
stretches of the depth and in random order (RULER's order is the same in every sample), and no key
or value occurs twice.
"""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dynmask.eval.haystacks import Book, Draft, Hay, Lines, Question
from dynmask.eval.words import sample_pairs

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""One line of RULER's hay without content."""


@dataclass(frozen=True)
class Niah:
    """A task of needles: the hay, and what is hidden for one question.

    Attributes:
        hay: ``"noise"``, ``"book"``, or ``"needles"`` (each line a needle that is not asked for).
        keys: keys hidden for one question.
        asked: how many of them it asks for.
        values: values of each key.
        uuid_keys: keys are UUIDs, not words.
        uuid_values: values are UUIDs, not numbers of seven digits.
    """

    hay: Literal["noise", "book", "needles"]
    keys: int = 1
    asked: int = 1
    values: int = 1
    uuid_keys: bool = False
    uuid_values: bool = False

    @property
    def nouns(self) -> tuple[str, str]:
        """What a value is called: one, and several."""
        return ("uuid", "uuids") if self.uuid_values else ("number", "numbers")


NIAH: dict[str, Niah] = {
    "single_1": Niah("noise"),
    "single_2": Niah("book"),
    "single_3": Niah("book", uuid_values=True),
    "multikey": Niah("book", keys=4),
    "multikey_2": Niah("needles"),
    "multikey_3": Niah("needles", uuid_keys=True, uuid_values=True),
    "multivalue": Niah("book", values=4),
    "multiquery": Niah("book", keys=4, asked=4),
}
"""The tasks by RULER's names; `multikey` is its niah_multikey_1."""


def niah_draft(rule: Niah, texts: Sequence[str], *, questions: int, rng: random.Random) -> Draft:
    """A haystack that hides, `questions` times over, what RULER hides for one question.

    Args:
        rule: the task.
        texts: what books are cut from.
        questions: questions to ask of it, at least 1.
        rng: of keys, values, depths and the hay.
    """
    keys = list(itertools.islice(_keys(rule, rng), questions * rule.keys))
    values = list(itertools.islice(_values(rule, rng), len(keys) * rule.values))
    facts = [(keys[index // rule.values], value) for index, value in enumerate(values)]
    order = rng.sample(range(len(facts)), len(facts))  # the fact at each depth
    where = {fact: place for place, fact in enumerate(order)}
    asked = []
    for first in range(0, len(keys), rule.keys):
        chosen = range(first * rule.values, (first + rule.asked) * rule.values)
        key = _enumerate(keys[first : first + rule.asked])
        gold = tuple(values[fact] for fact in chosen)
        needles = tuple(where[fact] for fact in chosen)
        asked.append(Question(key, question(rule, key), gold, needles))
    return Draft(
        header=header(rule),
        hay=_hay(rule, texts, rng, taken={*keys, *values}),
        hidden=tuple(needle(rule, *facts[fact]) for fact in order),
        depths=tuple((place + rng.random()) / len(facts) for place in range(len(facts))),
        questions=tuple(asked),
    )


def header(rule: Niah) -> str:
    """What stands before the hay."""
    one, several = rule.nouns
    what = f"Some special magic {several} are" if _plural(rule) else f"A special magic {one} is"
    noun = several if _plural(rule) else one
    return (
        f"{what} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {noun} afterwards.\n"
    )


def needle(rule: Niah, key: str, value: str) -> str:
    """The sentence that is hidden."""
    return f"One of the special magic {rule.nouns[1]} for {key} is: {value}."


def question(rule: Niah, key: str) -> str:
    """The question with RULER's start of the answer."""
    one, several = rule.nouns
    be, noun = ("are", several) if _plural(rule) else ("is", one)
    what = "What are all" if _plural(rule) else "What is"
    about = f"the special magic {noun} for {key} mentioned in the provided text"
    return f"\n{what} {about}? T{about[1:]} {be}"


def _plural(rule: Niah) -> bool:
    return rule.asked * rule.values > 1


def _enumerate(keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"


def _hay(rule: Niah, texts: Sequence[str], rng: random.Random, *, taken: set[str]) -> Hay:
    if rule.hay == "book":
        return Book(texts, rng)
    if rule.hay == "noise":
        return Lines(itertools.repeat(NOISE))
    # Generators of its own: how much hay is drawn must not change what is drawn after it.
    keys, values = (
        _keys(rule, random.Random(rng.random())),
        _values(rule, random.Random(rng.random())),
    )
    fresh = (
        (key, value) for key, value in zip(keys, values, strict=False) if not taken & {key, value}
    )
    return Lines(needle(rule, key, value) for key, value in fresh)


def _keys(rule: Niah, rng: random.Random) -> Iterator[str]:
    """Keys without end, none twice."""
    if rule.uuid_keys:
        yield from _uuids(rng)
    seen: set[str] = set()
    while True:
        (key,) = sample_pairs(rng, 1)
        if key not in seen:
            seen.add(key)
            yield key


def _values(rule: Niah, rng: random.Random) -> Iterator[str]:
    """Values without end, none twice."""
    if rule.uuid_values:
        yield from _uuids(rng)
    seen: set[int] = set()
    while True:
        number = rng.randrange(1_000_000, 10_000_000)
        if number not in seen:
            seen.add(number)
            yield str(number)


def _uuids(rng: random.Random) -> Iterator[str]:
    while True:
        yield str(uuid.UUID(int=rng.getrandbits(128), version=4))
