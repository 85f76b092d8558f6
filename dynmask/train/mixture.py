"""Training sequences that teach retrieval: text, needles in text, line records, key-value lists.

And documents of further tasks, see ``dynmask.train.templates_niah`` and those beside it.

Every maker fills exactly ``size`` tokens and gives each token a loss weight, so that answers count
much and random numbers, which nothing can predict, count little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from dynmask.eval import prompts
from dynmask.train.corpus import Corpus
from dynmask.train.source import Batch, Step
from dynmask.train.templates import CUT, Key, Piece, TemplateWriter, flatten, length
from dynmask.train.templates_fwe import FrequentWords
from dynmask.train.templates_hay import Draft, in_lines, in_text
from dynmask.train.templates_niah import Niah
from dynmask.train.templates_pairs import KeyValue
from dynmask.train.templates_vt import VariableTracking

Sequence = tuple[np.ndarray, np.ndarray]
"""Ids ``[size]`` int64 and weights ``[size]`` fp32."""

KINDS = ("text", "needles", "lines", "pairs")
"""The kinds of sequences: methods of `Sequences` and shares in a `Mixture`."""

TASKS = ("niah", "vt", "fwe", "keyvalue")
"""Further kinds, of which a `Mixture` has none by default: RULER's tasks, key-value objects."""

MIN_WORDS = 1000
"""Fewer key words would let a model learn the keys instead of looking them up."""

KEY, VALUE = "{key}", "{value}"
LINE = prompts.record_line(KEY, VALUE)
SHORT = prompts.completion_question(KEY) + prompts.completion_answer(VALUE)
FIRST_QUESTION = {
    "completion": SHORT,
    "official": prompts.official_question(KEY) + CUT + SHORT.lstrip("\n"),
    "official, new line": prompts.official_question(KEY).rstrip(" ") + SHORT,
    "base": prompts.base_question(KEY) + f" <{VALUE}>",
    "line": "\n" + LINE.rstrip("\n"),
}
# Only the first question of a record carries the long official text.
NEXT_QUESTION = FIRST_QUESTION | {
    "official": SHORT,
    "official, new line": SHORT,
    "base": f"\nLine <{KEY}>: <REGISTER_CONTENT> is <{VALUE}>",
}
CITY = prompts.city_needle(KEY, VALUE), prompts.city_question(KEY) + prompts.needle_answer(VALUE)
RULER_QUESTION = prompts.ruler_question(KEY) + prompts.needle_answer(VALUE)
NEEDLES = (CITY, (" " + prompts.ruler_needle(KEY, VALUE), RULER_QUESTION))
PAIR_LINE = '"{key}": "{value}",\n'
PAIR_QUESTION = '\nKey: "{key}"\nCorresponding value: "{value}"'


@dataclass(frozen=True)
class Mixture:
    """Shares of the sequence kinds and the weights of their tokens; all other tokens weigh 1.

    Attributes:
        text: share of running text; the shares are normalised to one.
        needles: share of text with needles.
        lines: share of LongEval records.
        pairs: share of key-value lists.
        niah: share of RULER's needles, several of a key or of a question among them.
        vt: share of RULER's variable tracking.
        fwe: share of RULER's frequent words.
        keyvalue: share of key-value objects in the evaluation's wording.
        answer: loss weight of an answer.
        noise: loss weight of a random number where it is first written.
        key: loss weight of a key: random too, but made of words.
        questions: fewest and most questions in a record.
        inserted: fewest and most needles in a text.

    Raises:
        ValueError: a share or a weight is negative, all shares are zero, or a range is no range.
    """

    text: float = 0.30
    needles: float = 0.17
    lines: float = 0.45
    pairs: float = 0.08
    niah: float = 0.0
    vt: float = 0.0
    fwe: float = 0.0
    keyvalue: float = 0.0
    answer: float = 4.0
    noise: float = 0.02
    key: float = 0.1
    questions: tuple[int, int] = (8, 64)
    inserted: tuple[int, int] = (1, 16)

    def __post_init__(self) -> None:
        for name in (*KINDS, *TASKS, "answer", "noise", "key"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"mixture: {name}={getattr(self, name)} must be a number of at least 0"
                )
        if not any(getattr(self, kind) for kind in (*KINDS, *TASKS)):
            names = ", ".join((*KINDS, *TASKS))
            raise ValueError(f"mixture: one of the shares {names} must be over 0")
        for name in ("questions", "inserted"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1]:
                raise ValueError(
                    f"mixture: {name}={bounds} must be two numbers, fewest (at least 1) and most"
                )


class Sequences:
    """Makes sequences from a corpus; a batch is drawn from ``(seed, number of the step)`` alone.

    Args:
        corpus: tokenised text and the words that keys are made of.
        tokenizer: the one that the corpus was tokenised with.
        mixture: shares and weights.

    Raises:
        ValueError: too few key words in the corpus.
    """

    kinds = (*KINDS, *TASKS)

    def __init__(
        self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, mixture: Mixture
    ) -> None:
        if len(corpus.words) < MIN_WORDS:
            raise ValueError(
                f"data: {len(corpus.words)} key words (3 to 10 letters, 5 times or more) found, "
                f"{MIN_WORDS} needed; give more text"
            )
        self.corpus, self.mixture, self.answer = corpus, mixture, mixture.answer
        self._write = TemplateWriter(tokenizer)
        self._end = tokenizer.eos_token_id
        self._full_stop = self._write.ids(".")[0]
        self._niah = Niah(self._write, corpus.words, mixture)
        self._vt = VariableTracking(self._write, mixture)
        self._fwe = FrequentWords(self._write, mixture)
        self._keyvalue = KeyValue(self._write, corpus.words, mixture)

    def require(self, tokens: int) -> None:
        """Raise ValueError unless a sequence of so many tokens can be made."""
        self.corpus.require(tokens)

    def sha256(self) -> str:
        """Digest of the text."""
        return self.corpus.sha256()

    def at(self, step: Step) -> Batch:
        """The batch of a step."""
        rng = np.random.default_rng((step.seed, step.number))
        ids, weights, kinds = self.batch(rng, step.rows, step.length)
        return Batch(ids, weights, kinds)

    def batch(
        self, rng: np.random.Generator, rows: int, size: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw ``rows`` sequences of ``size`` tokens.

        A kind that finds no room in ``size`` tokens gives running text instead.

        Returns:
            ids ``[rows, size]`` int64, weights ``[rows, size]`` fp32 (a weight stands at the token
            whose prediction it weighs), and kinds ``[rows]``, indices into ``kinds``.

        Raises:
            ValueError: the corpus is shorter than ``size``.
        """
        self.corpus.require(size)
        shares = np.array([getattr(self.mixture, kind) for kind in self.kinds])
        kinds = rng.choice(len(shares), size=rows, p=shares / shares.sum())
        ids = np.empty((rows, size), dtype=np.int64)
        weights = np.empty((rows, size), dtype=np.float32)
        for row, kind in enumerate(kinds):
            ids[row], weights[row] = getattr(self, self.kinds[kind])(rng, size)
        return ids, weights, kinds

    def text(self, rng: np.random.Generator, size: int) -> Sequence:
        """A window of running text."""
        return self._window(rng, size), np.ones(size, dtype=np.float32)

    def lines(self, rng: np.random.Generator, size: int) -> Sequence:
        """A LongEval record of lines, then questions about lines at random depths."""
        m = self.mixture
        form = str(rng.choice(list(FIRST_QUESTION), p=[0.4, 0.15, 0.1, 0.15, 0.2]))
        # One record in eight has a single question, as the evaluation asks it.
        wanted = 1 if rng.random() < 0.125 else self._questions(rng, size)
        head = self._write.pieces(prompts.LINES_HEADER)
        # A question takes fewer than 40 tokens, the long official text 60 more.
        room = size - length(head) - 40 * wanted - 60
        body, seen = self._record(rng, room, template=LINE, digits=None)
        if not seen:
            return self.text(rng, size)
        asked: list[Piece] = []
        for number, index in enumerate(rng.integers(0, len(seen), wanted)):
            template = (NEXT_QUESTION if number else FIRST_QUESTION)[form]
            asked += self._write.pieces(
                template, *seen[index], key_weight=m.key, value_weight=m.answer
            )
        return self._fill(rng, [*head, *body, *asked], size)

    def pairs(self, rng: np.random.Generator, size: int) -> Sequence:
        """A JSON-like object of words and numbers, then questions for the values of keys."""
        m = self.mixture
        wanted = self._questions(rng, size) // 2 + 1
        head = self._write.pieces("JSON data:\n{")
        room = size - length(head) - 36 * wanted - 20
        digits = int(rng.choice([4, 5, 6, 8]))
        body, seen = self._record(rng, room, template=PAIR_LINE, digits=digits)
        if not seen:
            return self.text(rng, size)
        asked = self._write.pieces("}\n")
        for index in rng.integers(0, len(seen), wanted):
            asked += self._write.pieces(
                PAIR_QUESTION, *seen[index], key_weight=m.key, value_weight=m.answer
            )
        return self._fill(rng, [*head, *body, *asked], size)

    def needles(self, rng: np.random.Generator, size: int) -> Sequence:
        """Running text with needles at sentence ends, some of them asked for at the end."""
        m = self.mixture
        low, high = m.inserted
        count = max(1, min(int(rng.integers(low, high + 1)), size // 128))
        city = rng.random() < 0.6
        needle, question = NEEDLES[0 if city else 1]
        facts = [(self._name(rng, city), self._number(rng, 7)) for _ in range(count)]
        asked: list[Piece] = []
        for index in rng.permutation(count)[: int(rng.integers(1, count + 1))]:
            asked += self._write.pieces(question + ".", *facts[index], value_weight=m.answer)
        inserts = [
            self._write.pieces(needle, *fact, key_weight=m.key, value_weight=m.noise)
            for fact in facts
        ]
        room = size - 1 - length(asked) - sum(length(insert) for insert in inserts)
        if room < size // 4:
            return self.text(rng, size)
        pieces = in_text(rng, self._window(rng, room), inserts, stop=self._full_stop)
        return self._fill(rng, [*pieces, *asked], size)

    def niah(self, rng: np.random.Generator, size: int) -> Sequence:
        """RULER's needles in text, in noise or among other needles."""
        return self._drafted(rng, self._niah.draft(rng, size), size)

    def vt(self, rng: np.random.Generator, size: int) -> Sequence:
        """RULER's chains of assignments in noise."""
        return self._drafted(rng, self._vt.draft(rng, size), size)

    def fwe(self, rng: np.random.Generator, size: int) -> Sequence:
        """RULER's coded text, whose frequent words are asked for."""
        pieces = self._fwe.pieces(rng, size - 1)
        return self.text(rng, size) if pieces is None else self._fill(rng, pieces, size)

    def keyvalue(self, rng: np.random.Generator, size: int) -> Sequence:
        """A JSON object in the evaluation's wording, then questions for the values of keys."""
        pieces = self._keyvalue.pieces(rng, size - 1, questions=self._questions(rng, size))
        return self.text(rng, size) if pieces is None else self._fill(rng, pieces, size)

    def _drafted(self, rng: np.random.Generator, draft: Draft, size: int) -> Sequence:
        """A draft with as much hay as fits; running text if that is little."""
        room = size - 1 - draft.tokens
        if room < size // 8:
            return self.text(rng, size)
        if draft.hay is None:
            hay = in_text(rng, self._window(rng, room), draft.hidden, stop=self._full_stop)
        else:
            hay = in_lines(rng, self._write, draft.hay, draft.hidden, room=room)
        return self._fill(rng, [*draft.head, *hay, *draft.asked], size)

    def _record(
        self, rng: np.random.Generator, room: int, *, template: str, digits: int | None
    ) -> tuple[list[Piece], list[tuple[Key, list[int]]]]:
        """As many lines of distinct keys as fit into ``room`` tokens, and their facts."""
        m = self.mixture
        words = self._key_words(rng)
        drawn = rng.integers(0, len(words), (max(room, 0) // 12 + 1, 2))
        body: list[Piece] = []
        seen: dict[Key, list[int]] = {}
        for first, second in drawn:
            key = self._write.key(words[first], words[second])
            if key in seen:
                continue
            value = self._number(rng, digits)
            line = self._write.pieces(template, key, value, key_weight=m.key, value_weight=m.noise)
            room -= length(line)
            if room < 0:
                break
            seen[key] = value
            body += line
        return body, list(seen.items())

    def _questions(self, rng: np.random.Generator, size: int) -> int:
        """Log-uniform between the fewest and the most, and at most one in 64 tokens."""
        low, high = self.mixture.questions
        return max(1, min(int(np.exp(rng.uniform(np.log(low), np.log(high + 1)))), size // 64))

    def _number(self, rng: np.random.Generator, digits: int | None) -> list[int]:
        """A number of so many digits; None: LongEval's 1 to 50,000."""
        low, high = (1, 50_001) if digits is None else (10 ** (digits - 1), 10**digits)
        return self._write.number(int(rng.integers(low, high)))

    def _name(self, rng: np.random.Generator, city: bool) -> Key:
        """A needle's key: one or two capitalised words, or two joined by a hyphen."""
        first, second = (self.corpus.words[i] for i in rng.integers(0, len(self.corpus.words), 2))
        if not city:
            return self._write.key(first, second)
        if rng.random() < 0.6:
            return self._write.key(first.title())
        return self._write.key(first.title(), second.title(), joiner=" ")

    def _key_words(self, rng: np.random.Generator) -> list[str]:
        """The words a record draws from: sometimes few, so that many keys share a half."""
        words = self.corpus.words
        count = min(int(rng.choice([64, 512, len(words)], p=[0.15, 0.35, 0.5])), len(words))
        start = int(rng.integers(0, len(words) - count + 1))
        return words[start : start + count]

    def _window(self, rng: np.random.Generator, size: int) -> np.ndarray:
        start = int(rng.integers(0, len(self.corpus.tokens) - size + 1))
        return self.corpus.tokens[start : start + size].astype(np.int64)

    def _fill(self, rng: np.random.Generator, pieces: list[Piece], size: int) -> Sequence:
        """Close the pieces with the end token; running text in front fills up to ``size``.

        Pieces that are too long lose their start.
        """
        ids, weights = flatten([*pieces, ([self._end], 1.0)])
        missing = size - len(ids)
        if missing <= 0:
            return ids[-size:], weights[-size:]
        before = self._window(rng, missing)
        before[-1] = self._end
        return (
            np.concatenate([before, ids]),
            np.concatenate([np.ones(missing, dtype=np.float32), weights]),
        )
