"""RULER's variable tracking: find all names that a value was handed on to.

Source: NVIDIA/RULER (Apache-2.0), task `vt`: noise, a chain of five assignments, one worked example
in front. The wording is the paper's (arXiv 2404.06654, appendix): the code says "assgined" and
ends with a space, which many tokenizers join to the answer's first letters.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Iterator

from dynmask.eval.haystacks import Draft, Lines, Question
from dynmask.eval.niah import NOISE
from dynmask.eval.words import is_eval_word

HOPS = 4
"""Assignments of a name to a name; a chain has one more."""

_HEADER = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_LETTERS = 5
_EXAMPLE_LETTERS = 3
_EXAMPLE_LINES = 10


def tracking_draft(*, questions: int, rng: random.Random) -> Draft:
    """A worked example, then noise with a chain for each question.

    Args:
        questions: chains to hide, each asked for by its value.
        rng: of names, values and depths.
    """
    values = [str(value) for value in rng.sample(range(10_000, 100_000), questions + 1)]
    example = _example(values.pop(), rng)
    names = _names(rng, _LETTERS)
    chains = [list(itertools.islice(names, HOPS + 1)) for _ in values]
    hidden: list[tuple[float, int, str]] = []  # depth, chain, assignment
    for index, (value, chain) in enumerate(zip(values, chains, strict=True)):
        depths = sorted(rng.random() for _ in chain)
        hidden += zip(depths, itertools.repeat(index), assignments(value, chain), strict=False)
    hidden.sort()
    asked = []
    for index, (value, chain) in enumerate(zip(values, chains, strict=True)):
        needles = tuple(place for place, (_, owner, _) in enumerate(hidden) if owner == index)
        asked.append(Question(value, tracking_question(value), tuple(chain), needles))
    return Draft(
        header=example + _HEADER,
        hay=Lines(itertools.repeat(NOISE)),
        hidden=tuple(text for _, _, text in hidden),
        depths=tuple(depth for depth, _, _ in hidden),
        questions=tuple(asked),
    )


def assignments(value: str, names: list[str]) -> list[str]:
    """The lines of a chain."""
    later = [f"VAR {name} = VAR {before}" for before, name in itertools.pairwise(names)]
    return [f"VAR {names[0]} = {value}", *later]


def tracking_question(value: str) -> str:
    """The question with the start of its answer."""
    return (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{HOPS + 1} variables are assigned the value {value}, they are:"
    )


def tracking_answer(names: int | str) -> str:
    """What a model should put after `tracking_question`; `names` with a space between."""
    return f" {names}"


def _example(value: str, rng: random.Random) -> str:
    chain = list(itertools.islice(_names(rng, _EXAMPLE_LETTERS), HOPS + 1))
    lines = [NOISE] * _EXAMPLE_LINES
    places = sorted(rng.sample(range(_EXAMPLE_LINES), HOPS + 1))
    for shift, (place, line) in enumerate(zip(places, assignments(value, chain), strict=True)):
        lines.insert(place + shift, line)
    return (
        _HEADER
        + "\n".join(lines)
        + tracking_question(value)
        + tracking_answer(" ".join(chain))
        + "\n\n"
    )


def _names(rng: random.Random, letters: int) -> Iterator[str]:
    """Names of capital letters without end, none twice."""
    seen: set[str] = set()
    while True:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in seen and is_eval_word(name):
            seen.add(name)
            yield name
