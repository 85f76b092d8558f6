"""LongEval lines: find one number among many lines of the same form.

Source: DachengLi1/LongChat (Apache-2.0), task "lines". The prompts are the official ones (see
    `prompts`); the keys of generated records are our own, from the evaluation's word list.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmask.eval import prompts
from dynmask.eval.result import Result, accuracy_result
from dynmask.eval.runner import Progress, Prompt, ask, encode, encode_prefix
from dynmask.eval.words import sample_pairs

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """One line asked for: its key, its number, and its place in the record counted from 0."""

    key: str
    expected: int
    position: int


@dataclass(frozen=True)
class Record:
    """A record of lines and the questions asked of it.

    Attributes:
        text: header and lines; the prompt's prefix.
        lines: how many lines.
        questions: which lines are asked for.
        official: the file's own question text if the record was read from a file.
    """

    text: str
    lines: int
    questions: tuple[Question, ...]
    official: str | None = None


@dataclass(frozen=True)
class Form:
    """A way to ask: the question's text, where to stop, how the number is read from the output."""

    question: Callable[[str], str]
    read: Callable[[str], int]
    max_new_tokens: int
    stop: tuple[str, ...]


def last_integer(output: str) -> int:
    """The official rule: the last integer in the output, -1 if there is none."""
    numbers = re.findall(r"\d+", output)
    return int(numbers[-1]) if numbers else -1


def integer_before_bracket(output: str) -> int:
    """The integer that alone stands before the first ``>``; -1 if none does."""
    match = re.match(r"\s*(\d+)\s*>", output)
    return int(match[1]) if match else -1


FORMS: dict[str, Form] = {
    "completion": Form(prompts.completion_question, integer_before_bracket, 10, (">", "\n")),
    "official": Form(prompts.official_question, last_integer, 100, ("\n",)),
    "base": Form(prompts.base_question, last_integer, 15, ("\n",)),
}
"""`completion`: for models that follow no instructions. `official`: for chat models. `base`: the
official question with the start of an answer, as LongEval asks base models."""


def make_records(*, lines: int, n: int, questions: int, seed: int) -> list[Record]:
    """Records with `n` questions in all, `questions` a record (the last may have fewer).

    The asked lines of a record are drawn one from each of as many equal stretches of it, so that
    depth is uniform.

    Args:
        lines: lines of a record, at least 1.
        n: questions in all, at least 1.
        questions: questions of one record, 1 to `lines`.
        seed: the same seed gives the same records.

    Raises:
        ValueError: a setting is out of its range.
    """
    for name, value in (("lines", lines), ("n", n), ("questions", questions)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if questions > lines:
        raise ValueError(
            f"questions={questions} is more than lines={lines}: each line is asked for at most once"
        )
    records = []
    for index, first in enumerate(range(0, n, questions)):
        rng = random.Random(f"longeval-{lines}-{seed}-{index}")
        entries = [(key, rng.randint(*prompts.LINES_VALUES)) for key in sample_pairs(rng, lines)]
        count = min(questions, n - first)
        positions = [
            rng.randrange(i * lines // count, (i + 1) * lines // count) for i in range(count)
        ]
        asked = tuple(Question(*entries[position], position) for position in positions)
        records.append(Record(prompts.record(entries), lines, asked))
    return records


def read_records(path: str | Path, *, n: int) -> list[Record]:
    """The first `n` cases of an official ``*_lines.jsonl`` file, one question each.

    Raises:
        ValueError: a row is not a LongEval case, or the file has fewer than `n`.
    """
    marker = "\nNow the record is over."
    records: list[Record] = []
    with Path(path).open(encoding="utf-8") as file:
        for number, row in enumerate(file, 1):
            if len(records) == n:
                break
            try:
                case = json.loads(row)
                key, position = case["random_idx"]
                text, mark, rest = case["prompt"].rpartition(marker)
                question = Question(str(key), int(case["expected_number"]), int(position))
                lines = int(case["num_lines"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"cases: {path}, line {number} is not a LongEval lines case: {error!r}"
                ) from error
            if not mark:
                raise ValueError(f"cases: {path}, line {number}: the prompt has no {marker!r}")
            records.append(Record(text, lines, (question,), mark + rest))
    if len(records) < n:
        raise ValueError(
            f"n={n} is more than the {len(records)} cases in {path}; ask for at most that many"
        )
    return records


def longeval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lines: int = 200,
    n: int = 50,
    questions: int = 10,
    seed: int = 0,
    form: str = "completion",
    cases: str | Path | None = None,
    cache: Callable[[], Cache] | None = None,
    whole: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Accuracy of finding a line's number in a record of lines.

    Args:
        model: any causal language model of transformers, run as it is.
        tokenizer: the model's tokenizer.
        lines: lines of a record; 200 are 4,000 to 5,000 tokens. Not used with `cases`.
        n: questions in all; 95 % interval about +-14 points at 50, +-4.4 at 500.
        questions: questions that share one record and its prefill. Not used with `cases`.
        seed: of keys, numbers and asked lines. Not used with `cases`.
        form: ``"completion"`` (the number before ``>`` must match; chance 1 in 50,000),
            ``"official"`` or ``"base"`` (the last integer in the output must match).
        cases: an official ``*_lines.jsonl`` file to read instead of generating records; one
            question a case.
        cache: makes the caches, by default ones that every question can be cropped from.
        whole: read each question with its prompt in one forward: for caches and methods that look
            at the question to decide what they keep.
        progress: called after each question.

    Returns:
        Accuracy with Wilson's 95 % interval, by ten bins of depth, and one row for each question.

    Raises:
        ValueError: a setting is out of its range, or a record does not fit the model's context.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is unknown; choose one of {', '.join(FORMS)}")
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    rule = FORMS[form]
    settings: dict[str, Any] = {"form": form, "max_new_tokens": rule.max_new_tokens}
    if cases is None:
        records = make_records(lines=lines, n=n, questions=questions, seed=seed)
        settings |= {"lines": lines, "questions": questions, "seed": seed}
    else:
        records = read_records(cases, n=n)
        settings |= {"lines": records[0].lines, "questions": 1, "cases": Path(cases).name}
    asked = [_prompt(tokenizer, record, form) for record in records]
    start = time.perf_counter()
    answers = ask(
        model,
        tokenizer,
        asked,
        max_new_tokens=rule.max_new_tokens,
        stop=rule.stop,
        title=f"LongEval {records[0].lines} lines",
        cache=cache,
        whole=whole,
        progress=progress,
    )
    seconds = time.perf_counter() - start
    rows = []
    for index, (record, prompt) in enumerate(zip(records, asked, strict=True)):
        for i, question in enumerate(record.questions):
            output = answers[index][i]
            answer = rule.read(output)
            rows.append(
                {
                    "record": index,
                    "key": question.key,
                    "depth": question.position / record.lines,
                    "expected": question.expected,
                    "output": output,
                    "answer": answer,
                    "correct": answer == question.expected,
                    "prompt_tokens": len(prompt.prefix) + len(prompt.questions[i]),
                }
            )
    return accuracy_result("longeval", rows, seconds=seconds, settings=settings)


def _prompt(tokenizer: PreTrainedTokenizerBase, record: Record, form: str) -> Prompt:
    def text(key: str) -> str:
        if form == "official" and record.official is not None:
            return record.official
        return FORMS[form].question(key)

    return Prompt(
        encode_prefix(tokenizer, record.text),
        [encode(tokenizer, text(question.key)) for question in record.questions],
    )
