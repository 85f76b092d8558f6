"""The tasks of `compare.py`: prompts made once for a model, and asked under any method."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from dynmask.eval import keyvalue, longeval, ruler
from dynmask.eval import quizzes as quiz
from dynmask.eval.keyvalue import make_stores
from dynmask.eval.longeval import make_records
from dynmask.eval.needle import FORMS
from dynmask.eval.nll import token_nll
from dynmask.eval.perplexity import make_windows
from dynmask.eval.recall import most_likely
from dynmask.eval.runner import Prefill, encode, evaluating

Check = Callable[[], None]
"""Called before each prompt; raises to stop."""


@dataclass(frozen=True)
class Task:
    """What is asked.

    Attributes:
        name: In tables.
        run: "recall" (answers inside one forward), "perplexity", or by decoding "longeval",
            "ruler" or "keyvalue".
        length: Tokens of a prompt, at most.
        n: Questions, or windows; of these as many as the texts have, if they have fewer.
        kind: Of recall and ruler.
        form: Of key-value pairs.
        questions: That share a prompt.
        filler: Tokens after the last answer (recall).
        densities: In place of those of all tasks.
    """

    name: str
    run: str
    length: int
    n: int
    kind: str = ""
    form: str = "words"
    questions: int = 25
    filler: int = 512
    densities: tuple[float, ...] | None = None

    @classmethod
    def read(cls, name: str, raw: dict[str, Any]) -> Task:
        """Make one of what a configuration holds."""
        densities = tuple(raw["densities"]) if "densities" in raw else None
        return cls(name=name, **{**raw, "densities": densities})

    @property
    def path(self) -> str:
        """The calls whose rows find the answer, whose density is the one that counts."""
        return "prefill" if self.run in ("recall", "perplexity") else "decode"

    def __post_init__(self) -> None:
        if self.run not in ("recall", "perplexity", "longeval", "ruler", "keyvalue"):
            raise ValueError(f"task {self.name}: run={self.run!r} is unknown")


class Outcome(NamedTuple):
    """What came out.

    Attributes:
        marks: For each question, in an order that is the same for every method, how many strings
            of its answer were found; for each window its mean loss.
        strings: Of an answer; 0 where marks are losses.
        depths: Where each question's fact lies, 0 to 1.
        tokens: Of a prompt, the mean.
        prompts: How many were read.
        seconds: Of the model's part.
    """

    marks: list[float]
    strings: int
    depths: list[float]
    tokens: float
    prompts: int
    seconds: float


@dataclass
class Texts:
    """What haystacks and windows are cut from."""

    haystack: Sequence[str]
    perplexity: Sequence[str]


@dataclass
class Asker:
    """Asks one task of one model; prompts are made when first needed and kept.

    Attributes:
        task: What is asked.
        model: As it is when called: accelerated or not.
        tokenizer: The model's.
        texts: See `Texts`.
        seed: Of everything that is drawn.
    """

    task: Task
    model: Any
    tokenizer: Any
    texts: Texts
    seed: int
    _kept: dict[str, Any] = field(default_factory=dict)

    def ask(
        self, check: Check, *, n: int | None = None, cache: Any = None, whole: bool = False
    ) -> Outcome:
        """Ask the first ``n`` questions (all by default), so that methods can be paired.

        Args:
            check: See `Check`.
            n: Questions; a multiple of those that share a prompt, or all.
            cache: Makes the caches of decoding; transformers' by default.
            whole: Read each question with its prompt, for methods that have to see it (decoding).
        """
        n = self.task.n if n is None else min(n, self.task.n)
        with evaluating(self.model):
            if self.task.run == "recall":
                return self._recall(check, n)
            if self.task.run == "perplexity":
                return self._perplexity(check, n)
            return self._decoded(check, n, cache, whole)

    def probe(self, check: Check, prompts: int, cache: Any = None) -> None:
        """Run the calls of a few prompts, for the density that a setting gives."""
        task = self.task
        with evaluating(self.model):
            if task.run == "recall":
                for one in self._quizzes(prompts * task.questions):
                    check()
                    most_likely(self.model, one)
            elif task.run == "perplexity":
                # The last windows: the first ones are those that are asked.
                for window in self._windows()[-prompts:]:
                    check()
                    token_nll(self.model, window.ids)
            else:
                for ids in self._probes(prompts):
                    check()
                    made = None if cache is None else cache()
                    Prefill(self.model, ids, cache=made).go_on(
                        max_new_tokens=4, done=lambda tokens: False
                    )

    def _recall(self, check: Check, n: int) -> Outcome:
        quizzes = self._quizzes(self.task.n)
        marks: list[float] = []
        depths: list[float] = []
        tokens = []
        start = self._now()
        for one in quizzes:
            if len(marks) >= n:
                break
            check()
            for said, (first, stop) in zip(most_likely(self.model, one), one.spans, strict=True):
                marks.append(float(said == list(one.ids[first:stop])))
            depths += [fact.depth for fact in one.facts]
            tokens.append(len(one.ids))
        seconds = self._now() - start
        return Outcome(marks, 1, depths, statistics.fmean(tokens), len(tokens), seconds)

    def _perplexity(self, check: Check, n: int) -> Outcome:
        marks = []
        start = self._now()
        for window in self._windows()[:n]:
            check()
            marks.append(float(token_nll(self.model, window.ids).double().mean()))
        return Outcome(marks, 0, [], self.task.length, len(marks), self._now() - start)

    def _decoded(self, check: Check, n: int, cache: Any, whole: bool) -> Outcome:
        task = self.task
        given: dict[str, Any] = {
            "n": n,
            "questions": task.questions,
            "seed": self.seed,
            "cache": cache,
            "whole": whole,
            "progress": lambda done, total, text: check(),
        }
        if task.run == "longeval":
            result = longeval(self.model, self.tokenizer, lines=self._items(), **given)
        elif task.run == "keyvalue":
            pairs, form = self._items(), task.form
            result = keyvalue(self.model, self.tokenizer, pairs=pairs, form=form, **given)
        else:
            texts = self.texts.haystack
            result = ruler(
                self.model, self.tokenizer, texts, kind=task.kind, length=task.length, **given
            )
        rows = result.rows
        found = [row.get("found", [row["correct"]]) for row in rows]
        depths = [statistics.fmean(row.get("depths") or [row.get("depth", 0.0)]) for row in rows]
        prompts = len(rows) if whole else -(-n // task.questions)
        marks = [float(sum(strings)) for strings in found]
        return Outcome(marks, len(found[0]), depths, result.prompt_tokens, prompts, result.seconds)

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def _quizzes(self, n: int) -> list[quiz.Quiz]:
        if f"quizzes {n}" not in self._kept:
            self._kept[f"quizzes {n}"] = self._made(n)
        made: list[quiz.Quiz] = self._kept[f"quizzes {n}"]
        return made

    def _made(self, n: int) -> list[quiz.Quiz]:
        task, texts = self.task, self.texts.haystack
        given: dict[str, Any] = {
            "n": n,
            "questions": task.questions,
            "seed": self.seed,
            "filler": task.filler,
        }
        if task.kind == "lines":
            return quiz.line_quizzes(self.tokenizer, texts, lines=self._items(), **given)
        if task.kind == "keyvalue":
            pairs, form = self._items(), task.form
            return quiz.pair_quizzes(self.tokenizer, texts, form=form, pairs=pairs, **given)
        given["length"] = task.length
        if task.kind in FORMS:
            return quiz.needle_quizzes(self.tokenizer, texts, form=task.kind, **given)
        return quiz.ruler_quizzes(self.tokenizer, texts, kind=task.kind, **given)

    def _windows(self) -> list[Any]:
        if "windows" not in self._kept:
            # All there are, where texts are short of n: a row says how many it has.
            self._kept["windows"] = make_windows(
                self.tokenizer, self.texts.perplexity, length=self.task.length
            )
        windows: list[Any] = self._kept["windows"]
        return windows

    def _probes(self, count: int) -> list[list[int]]:
        """Prompts of the task's length, of any content: only their calls count."""
        if self.task.run == "longeval":
            texts = [
                record.text
                for record in make_records(
                    lines=self._items(), n=count, questions=1, seed=self.seed
                )
            ]
        elif self.task.run == "keyvalue":
            texts = [
                store.text
                for store in make_stores(
                    pairs=self._items(), n=count, questions=1, seed=self.seed, form=self.task.form
                )
            ]
        else:
            texts = ["".join(self.texts.haystack)[at * 40_000 :] for at in range(count)]
        # RULER's answers have room for 128 tokens.
        most = self.task.length - (160 if self.task.run == "ruler" else 32)
        return [encode(self.tokenizer, text[: 8 * most])[:most] for text in texts]

    def _items(self) -> int:
        """Lines or pairs that fill the task's length, which depends on the tokenizer."""
        if "items" not in self._kept:
            self._kept["items"] = self._fitted()
        items: int = self._kept["items"]
        return items

    def _fitted(self) -> int:
        task = self.task
        # An object of numbers has 4,500 pairs at most.
        low, high = max(2, task.questions), min(task.length // 8, 4500)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._fits(middle) else (low, middle - 1)
        # Prompts differ by a few tokens in a thousand.
        return max(int(low * 0.985), task.questions)

    def _fits(self, items: int) -> bool:
        task = self.task
        if task.run == "longeval" or task.kind == "lines":
            (record,) = make_records(lines=items, n=1, questions=1, seed=self.seed)
            text = record.text
            each = quiz.KINDS["lines"]
            key, value = record.questions[0].key, record.questions[0].expected
        else:
            (store,) = make_stores(pairs=items, n=1, questions=1, seed=self.seed, form=task.form)
            text = store.text
            each = quiz.KINDS["keyvalue"]
            key, value = store.asked[0].key, store.asked[0].value  # type: ignore[assignment]
        question = len(encode(self.tokenizer, each.question(key))) + len(
            encode(self.tokenizer, each.answer(value))
        )
        spoken = (question + 2) * task.questions + task.filler + 1
        # Longest answers: 10 tokens of a line, 100 of an object, as the tasks allow.
        if task.run != "recall":
            spoken = question + 2 + 100
        return len(encode(self.tokenizer, text)) + spoken <= task.length
