"""RULER's tasks: needles among other needles, variable tracking, frequent words.

Source: Hsieh et al., RULER, arXiv 2404.06654; NVIDIA/RULER (Apache-2.0), template for base models.
The score is RULER's `string_match_all`: the share of a question's gold strings that stand in the
output, in any case, averaged over the questions. RULER reads the whole output; here it ends with
its first line, as elsewhere in this package.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynmask.eval.frequent import frequent_draft
from dynmask.eval.haystacks import Draft, Filled, fill
from dynmask.eval.niah import NIAH, niah_draft
from dynmask.eval.result import Result, by_depth, wilson
from dynmask.eval.runner import Progress, Prompt, ask, context_length, encode
from dynmask.eval.tracking import tracking_draft

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS = {**dict.fromkeys(NIAH, 128), "vt": 30, "fwe": 50}
"""The kinds, and RULER's tokens for an answer of each; they count towards `length`."""


def string_match_all(output: str, gold: Sequence[str]) -> float:
    """The share of `gold` that stands in `output`, in any case."""
    return sum(string.lower() in output.lower() for string in gold) / len(gold)


def make_draft(
    kind: str, texts: Sequence[str], *, length: int, questions: int, rng: random.Random
) -> Draft:
    """What a prompt of a kind hides and asks.

    Args:
        kind: a name in `NEW_TOKENS`.
        texts: what books are cut from.
        length: tokens of the whole prompt.
        questions: questions to ask; 1 for ``"fwe"``.
        rng: of everything that is drawn.
    """
    if kind == "vt":
        return tracking_draft(questions=questions, rng=rng)
    if kind == "fwe":
        return frequent_draft(length=length, rng=rng)
    return niah_draft(NIAH[kind], texts, questions=questions, rng=rng)


def ruler(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    kind: str = "multikey",
    length: int = 8192,
    n: int = 50,
    questions: int = 1,
    seed: int = 0,
    cache: Callable[[], Cache] | None = None,
    whole: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Score of one of RULER's tasks, by greedy decoding.

    ============= ================ ==================================== ========================
    kind          hay              hidden for a question                asked for
    ============= ================ ==================================== ========================
    single_1      one noise line   a number                             the number of a key
    single_2      a book           a number                             the number of a key
    single_3      a book           a UUID                               the UUID of a key
    multikey      a book           4 numbers of 4 keys                  the number of a key
    multikey_2    other needles    a number                             the number of a key
    multikey_3    other needles    a UUID of a UUID                     the UUID of a UUID
    multivalue    a book           4 numbers of a key                   all 4
    multiquery    a book           4 numbers of 4 keys                  all 4
    vt            one noise line   a number handed on from name to name all 5 names
    fwe           coded words      nothing                              the 3 most frequent words
    ============= ================ ==================================== ========================

    Args:
        model: any causal language model of transformers, run as it is.
        tokenizer: the model's tokenizer.
        texts: what books are cut from; no text that the model was trained on.
        kind: the task; ``"multikey"`` is RULER's niah_multikey_1.
        length: tokens of the whole prompt, question and room for the answer included.
        n: questions in all.
        questions: questions that share a haystack and its prefill. It hides so many times what
            RULER hides for one, so that more questions are also harder; RULER's own is 1, and
            ``"fwe"`` takes no more.
        seed: of everything that is drawn.
        cache: makes the caches, by default ones that every question can be cropped from.
        whole: read each question with its prompt in one forward: for caches and methods that look
            at the question to decide what they keep.
        progress: called after each question.

    Returns:
        Mean of `string_match_all` with a 95 % interval; the values of an answer by ten bins of
        their depth (none for ``"fwe"``); one row for each question. The interval is Wilson's for n
        trials: exact in this sense where a question has one gold string, and else too wide rather
        than too narrow, since a share with mean p scatters no more than p (1 - p). The metric
        ``all_found`` is the share of questions whose every gold string was found.

    Raises:
        ValueError: a setting is out of its range, `length` is over the model's context or has no
            room, or the texts are too short.
    """
    if kind not in NEW_TOKENS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(NEW_TOKENS)}")
    for name, value in (("n", n), ("questions", questions), ("length", length)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if kind == "fwe" and questions > 1:
        raise ValueError(f"questions={questions}: a text of kind 'fwe' has one; leave it at 1")
    limit = context_length(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"length={length} is over the model's context of {limit} tokens; take at most that"
        )
    drafts: list[Draft] = []
    haystacks: list[Filled] = []
    chosen: list[list[int]] = []
    for index, first in enumerate(range(0, n, questions)):
        rng = random.Random(f"ruler-{kind}-{length}-{seed}-{index}")
        draft = make_draft(kind, texts, length=length, questions=questions, rng=rng)
        asked = max(len(encode(tokenizer, question.text)) for question in draft.questions)
        room = length - NEW_TOKENS[kind] - asked
        drafts.append(draft)
        haystacks.append(fill(tokenizer, draft, room=room, length=length))
        chosen.append(sorted(rng.sample(range(questions), min(questions, n - first))))
    prompts = [
        Prompt(hay.ids, [encode(tokenizer, draft.questions[i].text) for i in some])
        for draft, hay, some in zip(drafts, haystacks, chosen, strict=True)
    ]
    start = time.perf_counter()
    answers = ask(
        model,
        tokenizer,
        prompts,
        max_new_tokens=NEW_TOKENS[kind],
        stop=("\n",),
        title=f"RULER {kind}, {length} tokens",
        cache=cache,
        whole=whole,
        progress=progress,
    )
    seconds = time.perf_counter() - start
    rows = []
    for index, some in enumerate(chosen):
        for place, i in enumerate(some):
            question, output = drafts[index].questions[i], answers[index][place]
            found = [string.lower() in output.lower() for string in question.gold]
            rows.append(
                {
                    "haystack": index,
                    "key": question.key,
                    "depths": haystacks[index].depths_of(question),
                    "expected": list(question.gold),
                    "output": output,
                    "found": found,
                    "score": string_match_all(output, question.gold),
                    "correct": all(found),
                    "prompt_tokens": len(prompts[index].prefix)
                    + len(prompts[index].questions[place]),
                }
            )
    settings = {
        "kind": kind,
        "length": length,
        "questions": questions,
        "seed": seed,
        "max_new_tokens": NEW_TOKENS[kind],
    }
    return _result(rows, seconds=seconds, settings=settings)


def _result(
    rows: Sequence[Mapping[str, Any]], *, seconds: float, settings: Mapping[str, Any]
) -> Result:
    n, strings = len(rows), len(rows[0]["expected"])
    total = sum(sum(row["found"]) for row in rows) / strings
    pairs = [
        (depth, found)
        for row in rows
        for depth, found in zip(row["depths"], row["found"], strict=bool(row["depths"]))
    ]
    return Result(
        task="ruler",
        metric="accuracy",
        n=n,
        score=total / n,
        interval=wilson(total, n),
        parts=by_depth(*zip(*pairs, strict=True)) if pairs else (),
        prompt_tokens=sum(row["prompt_tokens"] for row in rows) / n,
        seconds=seconds,
        settings=settings,
        metrics={"all_found": sum(row["correct"] for row in rows) / n},
        rows=tuple(rows),
    )
