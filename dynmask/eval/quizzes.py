"""Prompts with many questions, their answers, and running text after them; see `recall`."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynmask.eval import prompts
from dynmask.eval.haystacks import fill
from dynmask.eval.keyvalue import make_stores, pair_answer, pair_question
from dynmask.eval.longeval import make_records
from dynmask.eval.needle import FORMS, make_haystack
from dynmask.eval.ruler import make_draft
from dynmask.eval.runner import encode, encode_prefix
from dynmask.eval.tracking import tracking_answer, tracking_question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Fact:
    """What is asked for: key, answer, and where it lies (0 start, 1 end of what is read)."""

    key: str
    expected: int | str
    depth: float


@dataclass(frozen=True)
class Quiz:
    """A prompt: a record, haystack or object, questions with their answers, filler.

    Attributes:
        ids: the prompt as token ids.
        facts: what is asked for, in the order of the questions.
        spans: for each question, the places ``[start, stop)`` of its answer in `ids`.
    """

    ids: tuple[int, ...]
    facts: tuple[Fact, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Kind:
    """A way to ask: the texts of a question and of its answer."""

    question: Callable[[str], str]
    answer: Callable[[int | str], str]


KINDS: dict[str, Kind] = {
    "lines": Kind(prompts.completion_question, prompts.completion_answer),
    **{name: Kind(form.question, prompts.needle_answer) for name, form in FORMS.items()},
    "multikey": Kind(prompts.ruler_question, prompts.needle_answer),
    "multikey_2": Kind(prompts.ruler_question, prompts.needle_answer),
    "vt": Kind(tracking_question, tracking_answer),
    "keyvalue": Kind(pair_question, pair_answer),
}
"""`lines`: LongEval's record of lines; `minference` and `ruler`: a haystack in `needle`'s forms;
`multikey`, `multikey_2` and `vt`: a haystack of `ruler`; `keyvalue`: the object of `keyvalue`."""


def line_quizzes(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    lines: int,
    n: int,
    questions: int,
    seed: int,
    filler: int,
) -> list[Quiz]:
    """Quizzes on the records of `longeval`, with `n` questions in all.

    Args:
        tokenizer: of the model to ask.
        texts: what the filler is cut from.
        lines: lines of a record.
        n: questions in all.
        questions: questions of one prompt, 1 to `lines`; the last may have fewer.
        seed: the same seed gives the same quizzes.
        filler: tokens of text after the last answer.

    Raises:
        ValueError: a setting is out of its range, or the texts are too short.
    """
    _check(n=n, questions=questions, filler=filler)
    rng = random.Random(f"recall-lines-{lines}-{seed}")
    records = make_records(lines=lines, n=n, questions=questions, seed=seed)
    tails = _tails(tokenizer, texts, filler, rng)
    quizzes = []
    for record, tail in zip(records, tails, strict=False):
        asked = [Fact(x.key, x.expected, x.position / lines) for x in record.questions]
        rng.shuffle(asked)
        prefix = encode_prefix(tokenizer, record.text)
        quizzes.append(_quiz(tokenizer, prefix, asked, tail, kind=KINDS["lines"]))
    return quizzes


def needle_quizzes(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    form: str,
    length: int,
    n: int,
    questions: int,
    seed: int,
    filler: int,
) -> list[Quiz]:
    """Quizzes on haystacks, with `n` questions in all.

    Args:
        tokenizer: of the model to ask.
        texts: what haystacks and filler are cut from.
        form: a name in `needle.FORMS`.
        length: tokens of a prompt, at most; questions, answers and filler included.
        n: questions in all.
        questions: needles of one haystack, each asked for; the last one's only as far as `n` goes.
        seed: the same seed gives the same quizzes.
        filler: tokens of text after the last answer.

    Raises:
        ValueError: a setting is out of its range, `length` leaves no room for the haystack, or the
            texts are too short.
    """
    _check(length=length, n=n, questions=questions, filler=filler)
    name = f"recall-{form}-{length}-{seed}"
    rng = random.Random(name)
    tails = _tails(tokenizer, texts, filler, rng)
    quizzes = []
    for first, tail in zip(range(0, n, questions), tails, strict=False):
        order = rng.sample(range(questions), min(questions, n - first))
        quizzes.append(
            _haystack_quiz(
                tokenizer,
                texts,
                tail,
                order,
                form=form,
                length=length,
                needles=questions,
                seed=f"{name}-{first}",
            )
        )
    return quizzes


def ruler_quizzes(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    kind: str,
    length: int,
    n: int,
    questions: int,
    seed: int,
    filler: int,
) -> list[Quiz]:
    """Quizzes on the haystacks of `ruler`, with `n` questions in all.

    Args:
        tokenizer: of the model to ask.
        texts: what books and filler are cut from.
        kind: ``"multikey"``, ``"multikey_2"`` or ``"vt"``.
        length: tokens of a prompt, at most; questions, answers and filler included.
        n: questions in all.
        questions: questions of one haystack; the last one's only as far as `n` goes.
        seed: the same seed gives the same quizzes.
        filler: tokens of text after the last answer.

    Raises:
        ValueError: a setting is out of its range, `length` leaves no room for the haystack, or the
            texts are too short.
    """
    _check(length=length, n=n, questions=questions, filler=filler)
    rule = KINDS[kind]
    name = f"recall-{kind}-{length}-{seed}"
    tails = _tails(tokenizer, texts, filler, random.Random(name))
    quizzes = []
    for first, tail in zip(range(0, n, questions), tails, strict=False):
        rng = random.Random(f"{name}-{first}")
        draft = make_draft(kind, texts, length=length, questions=questions, rng=rng)
        asked = draft.questions[: n - first]
        expected = [" ".join(question.gold) for question in asked]
        spoken = sum(
            len(encode(tokenizer, text))
            for question, answer in zip(asked, expected, strict=True)
            for text in (rule.question(question.key), rule.answer(answer))
        )
        hay = fill(tokenizer, draft, room=length - len(tail) - spoken, length=length)
        facts = [
            Fact(question.key, answer, statistics.fmean(hay.depths_of(question)))
            for question, answer in zip(asked, expected, strict=True)
        ]
        quizzes.append(_quiz(tokenizer, hay.ids, facts, tail, kind=rule))
    return quizzes


def pair_quizzes(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    form: str,
    pairs: int,
    n: int,
    questions: int,
    seed: int,
    filler: int,
) -> list[Quiz]:
    """Quizzes on the objects of `keyvalue`, with `n` questions in all.

    Args:
        tokenizer: of the model to ask.
        texts: what the filler is cut from.
        form: a name in `keyvalue.FORMS`.
        pairs: pairs of an object.
        n: questions in all.
        questions: questions of one prompt, 1 to `pairs`; the last may have fewer.
        seed: the same seed gives the same quizzes.
        filler: tokens of text after the last answer.

    Raises:
        ValueError: a setting is out of its range, or the texts are too short.
    """
    _check(filler=filler)
    rng = random.Random(f"recall-keyvalue-{form}-{pairs}-{seed}")
    stores = make_stores(pairs=pairs, n=n, questions=questions, seed=seed, form=form)
    tails = _tails(tokenizer, texts, filler, rng)
    quizzes = []
    for store, tail in zip(stores, tails, strict=False):
        asked = [Fact(pair.key, pair.value, pair.position / pairs) for pair in store.asked]
        rng.shuffle(asked)
        prefix = encode_prefix(tokenizer, store.text)
        quizzes.append(_quiz(tokenizer, prefix, asked, tail, kind=KINDS["keyvalue"]))
    return quizzes


def _check(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def _tails(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], filler: int, rng: random.Random
) -> Iterator[list[int]]:
    """Endless: a newline and a random run of `filler` of the texts' tokens."""
    newline = encode(tokenizer, "\n")
    ids = [token for text in texts for token in encode(tokenizer, text)]
    if len(ids) < filler:
        raise ValueError(
            f"texts have {len(ids)} tokens, but filler={filler}: give more text or take less filler"
        )
    while True:
        start = rng.randrange(len(ids) - filler + 1)
        yield [*newline, *ids[start : start + filler]]


def _quiz(
    tokenizer: PreTrainedTokenizerBase,
    prefix: Sequence[int],
    facts: Sequence[Fact],
    tail: Sequence[int],
    *,
    kind: Kind,
) -> Quiz:
    ids, spans = list(prefix), []
    for fact in facts:
        ids += encode(tokenizer, kind.question(fact.key))
        answer = encode(tokenizer, kind.answer(fact.expected))
        spans.append((len(ids), len(ids) + len(answer)))
        ids += answer
    return Quiz((*ids, *tail), tuple(facts), tuple(spans))


def _haystack_quiz(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    tail: Sequence[int],
    order: Sequence[int],
    *,
    form: str,
    length: int,
    needles: int,
    seed: str,
) -> Quiz:
    """A quiz of `length` tokens, or up to some 30 fewer; `order` says which needles to ask."""
    room = length - len(tail)
    while True:
        try:
            # The generator starts anew, so that a smaller haystack hides the same needles.
            rng = random.Random(seed)
            haystack = make_haystack(
                tokenizer, texts, length=room, needles=needles, rng=rng, form=form
            )
        except ValueError as error:
            raise ValueError(
                f"length={length} leaves {max(room, 0)} tokens for a haystack with "
                f"questions={needles}: {error}"
            ) from error
        hidden = [haystack.needles[i] for i in order]
        facts = [Fact(needle.key, needle.number, needle.depth) for needle in hidden]
        quiz = _quiz(tokenizer, haystack.ids, facts, tail, kind=KINDS[form])
        if len(quiz.ids) <= length:
            return quiz
        room -= len(quiz.ids) - length
