"""Recall inside the prefill: questions with their answers in the middle of a prompt.

`longeval` and `needle` ask at the end of a prompt and decode the answer. Decode looks at every key
and a sparse prefill may treat its last rows apart, so that they say little about the rows before.
Here many questions stand in the prompt with their answers and running text comes after them: the
rows that must find the facts are rows like all others. The model runs once over a prompt, without
a cache. It cannot copy the answers: an answer's token is read by later rows only, and no two
questions of a prompt ask for the same fact.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dynmask.eval.needle import FORMS
from dynmask.eval.quizzes import (
    KINDS,
    Quiz,
    line_quizzes,
    needle_quizzes,
    pair_quizzes,
    ruler_quizzes,
)
from dynmask.eval.result import Result, accuracy_result
from dynmask.eval.runner import (
    Progress,
    context_length,
    evaluating,
    input_device,
    logits_for_last,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    kind: str = "lines",
    lines: int = 200,
    pairs: int = 75,
    form: str = "digits",
    length: int = 8192,
    n: int = 50,
    questions: int = 10,
    seed: int = 0,
    filler: int = 512,
    progress: Progress | None = None,
) -> Result:
    """Accuracy of finding facts from rows in the middle of a prefill.

    A question is right if at each place of its answer the model's most likely token is the
    answer's, given all that stands before it. That is what greedy decoding would give, since a
    question with a wrong token counts as wrong whatever comes after.

    Args:
        model: any causal language model of transformers, run as it is.
        tokenizer: the model's tokenizer.
        texts: what haystacks and filler are cut from; no text that the model was trained on.
        kind: ``"lines"`` (a record as in `longeval`; the number and the ``>`` after it must match),
            ``"minference"`` or ``"ruler"`` (a haystack as in `needle`; the number must match),
            ``"multikey"``, ``"multikey_2"`` or ``"vt"`` (a haystack as in `ruler`; the number, or
            the five names in the order of their chain, must match), ``"keyvalue"`` (an object as in
            `keyvalue`; the value and the quotes around it must match).
        lines: lines of a record; 200 are about 5,000 tokens with questions and filler. Only for
            ``"lines"``.
        pairs: pairs of an object. Only for ``"keyvalue"``.
        form: ``"uuid"``, ``"digits"`` or ``"words"``, see `keyvalue`. Only for ``"keyvalue"``.
        length: tokens of a prompt, at most. Not for ``"lines"`` and ``"keyvalue"``.
        n: questions in all; 95 % interval about +-14 points at 50, +-4.4 at 500.
        questions: questions of one prompt; a haystack hides as many needles, or so many times what
            `ruler` hides for one question.
        seed: of records, haystacks, keys, numbers, order of the questions, and filler.
        filler: tokens of text after the last answer. Take several times as many as the attention
            under test treats apart at the end of a prompt.
        progress: called after each prompt.

    Returns:
        Accuracy with Wilson's 95 % interval, by ten bins of the fact's depth, and one row for each
        question, whose ``place`` is that of its answer in the prompt. ``settings["length"]`` is
        the longest prompt's if `kind` is ``"lines"`` or ``"keyvalue"``.

    Raises:
        ValueError: a setting is out of its range, a prompt does not fit the model's context, or
            the texts are too short.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}")
    settings: dict[str, Any] = {"questions": questions, "seed": seed, "filler": filler}
    if kind == "lines":
        quizzes = line_quizzes(tokenizer, texts, lines=lines, n=n, **settings)
        settings |= {"lines": lines, "length": _longest(model, quizzes)}
    elif kind == "keyvalue":
        quizzes = pair_quizzes(tokenizer, texts, form=form, pairs=pairs, n=n, **settings)
        settings |= {"form": form, "pairs": pairs, "length": _longest(model, quizzes)}
    else:
        _check_context(model, length)
        if kind in FORMS:
            quizzes = needle_quizzes(tokenizer, texts, form=kind, length=length, n=n, **settings)
        else:
            quizzes = ruler_quizzes(tokenizer, texts, kind=kind, length=length, n=n, **settings)
        settings |= {"length": length}
    answers = []
    done = 0
    start = time.perf_counter()
    with evaluating(model):
        for quiz in quizzes:
            answers.append(most_likely(model, quiz))
            done += len(quiz.facts)
            if progress is not None:
                progress(done, n, f"recall, {kind}")
    seconds = time.perf_counter() - start
    rows = [
        {
            "prompt": index,
            "key": fact.key,
            "depth": fact.depth,
            "place": first,
            "expected": fact.expected,
            "output": tokenizer.decode(said, clean_up_tokenization_spaces=False),
            "correct": said == list(quiz.ids[first:stop]),
            "prompt_tokens": len(quiz.ids),
        }
        for index, quiz in enumerate(quizzes)
        for fact, (first, stop), said in zip(quiz.facts, quiz.spans, answers[index], strict=True)
    ]
    settings = {"kind": kind, **settings}
    return accuracy_result(f"recall {kind}", rows, seconds=seconds, settings=settings)


def most_likely(model: PreTrainedModel, quiz: Quiz) -> list[list[int]]:
    """The model's most likely token at each place of each answer, from one forward.

    Returns:
        One list for each question, as long as its answer.
    """
    tokens = torch.tensor([list(quiz.ids)], device=input_device(model))
    # The logits of a row say what comes after it.
    before = [place - 1 for start, stop in quiz.spans for place in range(start, stop)]
    rows = torch.tensor(before, device=tokens.device)
    if logits_for_last(model):
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=rows).logits[0]
    else:
        logits = model(input_ids=tokens, use_cache=False).logits[0, rows]
    best = iter(logits.argmax(-1).tolist())
    return [[next(best) for _ in range(start, stop)] for start, stop in quiz.spans]


def _longest(model: PreTrainedModel, quizzes: Sequence[Quiz]) -> int:
    longest = max(len(quiz.ids) for quiz in quizzes)
    _check_context(model, longest)
    return longest


def _check_context(model: PreTrainedModel, length: int) -> None:
    limit = context_length(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"length={length} of the longest prompt is over the model's context of {limit} tokens: "
            f"take fewer lines or pairs, a smaller length, fewer questions or less filler"
        )
