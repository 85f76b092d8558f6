"""Text to hide things in, as long as there is room: a book, lines of any kind, coded words.

A `Draft` says what a prompt hides and asks; `fill` puts as much hay around it as the length allows.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dynmask.eval.needle import cut_to, place, running_text
from dynmask.eval.runner import encode, encode_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Hay(Protocol):
    """What things are hidden in. The same arguments give the same text every time."""

    def fill(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tokens: int,
        *,
        hidden: Sequence[str],
        depths: Sequence[float],
    ) -> tuple[str, list[float]]:
        """About so many tokens of hay with the hidden strings in it.

        Args:
            tokenizer: counts the tokens.
            tokens: of hay, without what is hidden.
            hidden: strings to put in.
            depths: for each, 0 (start) to 1 (end), ascending.

        Returns:
            The text, empty if `tokens` are too few; and the depths at which the strings lie.
        """
        ...


@dataclass(frozen=True)
class Question:
    """One question about a haystack.

    Attributes:
        key: what it asks about.
        text: the question with the start of its answer.
        gold: the strings that the answer must hold.
        needles: for each of `gold`, which of the hidden strings says it; empty if the hay does.
    """

    key: str
    text: str
    gold: tuple[str, ...]
    needles: tuple[int, ...] = ()


@dataclass(frozen=True)
class Draft:
    """A prompt before its hay is cut to length.

    Attributes:
        header: what stands before the hay.
        hay: what things are hidden in.
        hidden: the strings that are hidden.
        depths: where, ascending; see `Hay.fill`.
        questions: what is asked.
    """

    header: str
    hay: Hay
    hidden: tuple[str, ...]
    depths: tuple[float, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Filled:
    """A prompt's prefix: its text, its token ids, and the depths of what is hidden in the hay."""

    text: str
    ids: tuple[int, ...]
    depths: tuple[float, ...]

    def depths_of(self, question: Question) -> list[float]:
        """Where the answers to `question` lie."""
        return [self.depths[needle] for needle in question.needles]


def fill(tokenizer: PreTrainedTokenizerBase, draft: Draft, *, room: int, length: int) -> Filled:
    """Cut the hay so that header, hay and what is hidden take `room` tokens or a few fewer.

    Args:
        tokenizer: counts the tokens.
        draft: what to fill.
        room: tokens of the prefix, at most.
        length: what the user asked for, for the message.

    Raises:
        ValueError: `room` is too little for what is hidden, or the texts are too short for it.
    """
    own = [draft.header, *draft.hidden]
    tokens = room - sum(len(encode(tokenizer, text)) for text in own)
    while tokens > 0:
        text, depths = draft.hay.fill(tokenizer, tokens, hidden=draft.hidden, depths=draft.depths)
        if not text:
            break
        ids = encode_prefix(tokenizer, draft.header + text)
        if len(ids) <= room:
            return Filled(draft.header + text, tuple(ids), tuple(depths))
        # The joints cost tokens too; take off what they did.
        tokens -= len(ids) - room
    raise ValueError(
        f"length={length} leaves {max(room, 0)} tokens for header, hay and what is hidden in it "
        f"with questions={len(draft.questions)}: take a greater length or fewer questions"
    )


class Book:
    """Running text from a random sentence on; what is hidden stands as a sentence of its own.

    Args:
        texts: what to cut from; the end of one goes on into the next.
        rng: of the start.

    Raises:
        ValueError: there is no text.
    """

    def __init__(self, texts: Sequence[str], rng: random.Random) -> None:
        self._text = running_text(texts, rng)

    def fill(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tokens: int,
        *,
        hidden: Sequence[str],
        depths: Sequence[float],
    ) -> tuple[str, list[float]]:
        """See `Hay.fill`; the depths are moved back to the end of a sentence."""
        text = cut_to(tokenizer, self._text, tokens)
        return place(text, [f" {string}" for string in hidden], depths) if text else ("", [])


class Lines:
    """Lines of any kind; what is hidden stands in lines of its own.

    Args:
        lines: the lines, without end.
    """

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._drawn: list[str] = []

    def fill(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tokens: int,
        *,
        hidden: Sequence[str],
        depths: Sequence[float],
    ) -> tuple[str, list[float]]:
        """See `Hay.fill`; the depths count lines of hay, and are moved back to the end of one."""
        hay = self._take(tokenizer, tokens - len(hidden) * len(encode(tokenizer, "\n")))
        if not hay:
            return "", []
        places = [int(depth * len(hay)) for depth in depths]
        lines, last = [], 0
        for line, string in zip(places, hidden, strict=True):
            lines += [*hay[last:line], string]
            last = line
        return "\n".join([*lines, *hay[last:]]), [line / len(hay) for line in places]

    def _take(self, tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[str]:
        """The first lines that have up to so many tokens."""
        costs: dict[str, int] = {}
        count = 0
        while True:
            if count == len(self._drawn):
                self._drawn.append(next(self._lines))
            line = self._drawn[count]
            if line not in costs:
                costs[line] = len(encode(tokenizer, line + "\n"))
            tokens -= costs[line]
            if tokens < 0:
                return self._drawn[:count]
            count += 1


class Coded:
    """Words in random order whose frequency falls with their rank, as ``rank ** -alpha``.

    Of N words in all, the word of rank r stands ``int(N r^-alpha / zeta(alpha))`` times. Nothing
    can be hidden in it.

    Args:
        words: by rank, at least 5; the first is that of rank 1.
        alpha: the exponent.
        zeta: the sum over all ranks r of ``r ** -alpha``.
        seed: of the order.
    """

    def __init__(self, words: Sequence[str], *, alpha: float, zeta: float, seed: str) -> None:
        assert len(words) >= 5
        self._words, self._seed = words, seed
        self._shares = [rank**-alpha / zeta for rank in range(1, len(words) + 1)]

    def fill(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tokens: int,
        *,
        hidden: Sequence[str],
        depths: Sequence[float],
    ) -> tuple[str, list[float]]:
        """See `Hay.fill`; empty, too, where ranks 4 and 5 would stand equally often."""
        assert not hidden
        costs = [len(encode(tokenizer, f" {word}")) for word in self._words]

        def cost(total: int) -> int:
            return sum(count * each for count, each in zip(self._counts(total), costs, strict=True))

        # A word takes a token or more, so `tokens` words are the most there can be, save for those
        # that rounding down takes away.
        total = bisect_right(range(2 * tokens), tokens, key=cost) - 1
        counts = self._counts(total)
        if counts[3] == counts[4]:
            return "", []
        words = [
            word for word, count in zip(self._words, counts, strict=True) for _ in range(count)
        ]
        random.Random(self._seed).shuffle(words)
        return " ".join(words), []

    def _counts(self, total: int) -> list[int]:
        return [int(total * share) for share in self._shares]
