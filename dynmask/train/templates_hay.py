"""What facts are hidden in: running text, or lines of one form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from dynmask.eval.words import is_eval_word
from dynmask.train.templates import Piece, TemplateWriter, length


class Weights(Protocol):
    """Loss weights: of an answer, of what is random, and of a key, which is random words."""

    @property
    def answer(self) -> float:
        """Of an answer."""

    @property
    def noise(self) -> float:
        """Of a random number or name where it is first written."""

    @property
    def key(self) -> float:
        """Of a key of words."""


class Draft(NamedTuple):
    """A prompt before its hay.

    Attributes:
        head: What stands before the hay.
        hidden: What is hidden, in order.
        asked: Questions and answers, after the hay.
        hay: Endless lines; None for running text.
    """

    head: list[Piece]
    hidden: list[list[Piece]]
    asked: list[Piece]
    hay: Iterator[list[Piece]] | None

    @property
    def tokens(self) -> int:
        """Tokens of all but the hay, with a new line after each hidden thing."""
        lines = sum(length(pieces) + 1 for pieces in self.hidden)
        return length(self.head) + lines + length(self.asked)


def in_text(
    rng: np.random.Generator, window: np.ndarray, hidden: Sequence[list[Piece]], *, stop: int
) -> list[Piece]:
    """Put what is hidden into running text, behind full stops.

    Args:
        rng: of the places.
        window: ids ``[T]`` of the text.
        hidden: what is put in, in order.
        stop: id of a full stop.
    """
    room = len(window)
    stops = np.append(np.flatnonzero(window == stop) + 1, room)
    places = np.sort(stops[np.searchsorted(stops, rng.uniform(0, room, len(hidden)))])
    pieces: list[Piece] = []
    last = 0
    for insert, place in zip(hidden, places, strict=True):
        pieces += [(window[last:place].tolist(), 1.0), *insert]
        last = int(place)
    return [*pieces, (window[last:].tolist(), 1.0)]


def in_lines(
    rng: np.random.Generator,
    write: TemplateWriter,
    hay: Iterator[list[Piece]],
    hidden: Sequence[list[Piece]],
    *,
    room: int,
) -> list[Piece]:
    """Put what is hidden between lines of hay, joined by new lines.

    Args:
        rng: of the places.
        write: gives the new line.
        hay: endless lines.
        hidden: lines to put in, in order.
        room: tokens of the hay, its new lines included, at most.
    """
    lines: list[list[Piece]] = []
    while (cost := length(line := next(hay)) + 1) <= room:
        lines.append(line)
        room -= cost
    places = np.sort(rng.integers(0, len(lines) + 1, len(hidden)))
    mixed: list[list[Piece]] = []
    last = 0
    for line, place in zip(hidden, places, strict=True):
        mixed += [*lines[last:place], line]
        last = int(place)
    mixed += lines[last:]
    newline: Piece = (write.ids("\n"), 1.0)
    return [piece for number, line in enumerate(mixed) for piece in [newline, *line][not number :]]


def made_up(rng: np.random.Generator, alphabet: str, letters: int) -> Iterator[str]:
    """Random names of training without end, none twice and none of the evaluation's."""
    seen: set[str] = set()
    while True:
        name = "".join(alphabet[i] for i in rng.integers(0, len(alphabet), letters))
        if name not in seen and not is_eval_word(name):
            seen.add(name)
            yield name


def several(write: TemplateWriter, items: Sequence[list[int]], weight: float) -> list[Piece]:
    """``" a"``, ``" a, and b"``, ``" a, b, and c"``: RULER's way to write several.

    Args:
        write: gives what stands between.
        items: ids, each with the space before it.
        weight: of the items.
    """
    pieces: list[Piece] = []
    for number, ids in enumerate(items):
        if number:
            between = ", and" if number == len(items) - 1 else ","
            pieces.append((write.ids(between), 1.0))
        pieces.append((ids, weight))
    return pieces
