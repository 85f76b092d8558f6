"""Key-value retrieval: find the value of one key in a JSON object of many.

Source: Liu et al., Lost in the Middle, arXiv 2307.03172; nelson-liu/lost-in-the-middle (MIT), the
prompt of its task `kv_retrieval`. Its keys and values are UUIDs, which are hard for small models;
two forms with numbers are added.
"""

from __future__ import annotations

import random
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynmask.eval.result import Result, accuracy_result
from dynmask.eval.runner import Progress, Prompt, ask, context_length, encode, encode_prefix
from dynmask.eval.words import sample_pairs

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

FORMS = ("uuid", "digits", "words")
"""`uuid`: UUIDs, as published. `digits`: keys and values of four digits. `words`: keys of two
evaluation words, values of four digits."""

MAX_NEW_TOKENS = 100
"""Tokens of an answer, as published."""

_HEADER = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
)


@dataclass(frozen=True)
class Pair:
    """A pair that is asked for: key, value, and its place in the object counted from 0."""

    key: str
    value: str
    position: int


@dataclass(frozen=True)
class Store:
    """A JSON object in its prompt: the prompt's prefix, and the pairs that are asked for."""

    text: str
    asked: tuple[Pair, ...]


def make_stores(
    *, pairs: int, n: int, questions: int, seed: int, form: str = "uuid"
) -> list[Store]:
    """Objects with `n` questions in all, `questions` an object (the last may have fewer).

    The asked pairs of an object are drawn one from each of as many equal stretches of it, so that
    depth is uniform. No key or value of an object occurs twice in it.

    Args:
        pairs: pairs of an object, at least 2.
        n: questions in all, at least 1.
        questions: questions of one object, 1 to `pairs`.
        seed: the same seed gives the same objects.
        form: a name in `FORMS`.

    Raises:
        ValueError: a setting is out of its range.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is unknown; choose one of {', '.join(FORMS)}")
    for name, value, least in (("pairs", pairs, 2), ("n", n, 1), ("questions", questions, 1)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if questions > pairs:
        raise ValueError(
            f"questions={questions} is more than pairs={pairs}: each pair is asked for at most once"
        )
    if form != "uuid" and pairs > 4500:
        raise ValueError(
            f"pairs={pairs} is more than the numbers of four digits allow; take up to 4500, or "
            f"form='uuid'"
        )
    stores = []
    for index, first in enumerate(range(0, n, questions)):
        rng = random.Random(f"keyvalue-{form}-{pairs}-{seed}-{index}")
        keys, values = _draw(form, pairs, rng)
        count = min(questions, n - first)
        positions = [
            rng.randrange(i * pairs // count, (i + 1) * pairs // count) for i in range(count)
        ]
        asked = tuple(Pair(keys[place], values[place], place) for place in positions)
        lines = ",\n ".join(f'"{key}": "{value}"' for key, value in zip(keys, values, strict=True))
        stores.append(Store(f"{_HEADER}{{{lines}}}", asked))
    return stores


def pair_question(key: str) -> str:
    """The question with the start of its answer."""
    return f'\n\nKey: "{key}"\nCorresponding value:'


def pair_answer(value: int | str) -> str:
    """What a model should put after `pair_question`."""
    return f' "{value}"'


def is_right(output: str, value: str, form: str) -> bool:
    """Whether an output gives the value.

    With UUIDs by the published rule: the value stands in it, in any case. With numbers its first
    run of digits must be the value: a list of numbers of four digits would often hold it by chance.
    """
    if form == "uuid":
        return value in output.lower()
    number = re.search(r"\d+", output)
    return number is not None and number[0] == value


def keyvalue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pairs: int = 75,
    n: int = 50,
    questions: int = 10,
    seed: int = 0,
    form: str = "uuid",
    cache: Callable[[], Cache] | None = None,
    whole: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Accuracy of finding a key's value in a JSON object of pairs.

    Args:
        model: any causal language model of transformers, run as it is.
        tokenizer: the model's tokenizer.
        pairs: pairs of an object. Published are 75, 140 and 300; 75 UUID pairs are some 5,500
            tokens of a tokenizer that splits digits.
        n: questions in all; 95 % interval about +-14 points at 50, +-4.4 at 500.
        questions: questions that share one object and its prefill.
        seed: of keys, values and asked pairs.
        form: ``"uuid"`` (published), ``"digits"`` or ``"words"``; see `FORMS`. The output must hold
            the UUID; of numbers the first must be the value.
        cache: makes the caches, by default ones that every question can be cropped from.
        whole: read each question with its prompt in one forward: for caches and methods that look
            at the question to decide what they keep.
        progress: called after each question.

    Returns:
        Accuracy with Wilson's 95 % interval, by ten bins of the pair's depth, and one row for each
        question with its ``position``.

    Raises:
        ValueError: a setting is out of its range, or an object does not fit the model's context.
    """
    stores = make_stores(pairs=pairs, n=n, questions=questions, seed=seed, form=form)
    prompts = [
        Prompt(
            encode_prefix(tokenizer, store.text),
            [encode(tokenizer, pair_question(pair.key)) for pair in store.asked],
        )
        for store in stores
    ]
    limit, longest = context_length(model), max(prompt.tokens for prompt in prompts)
    if limit is not None and longest + MAX_NEW_TOKENS > limit:
        raise ValueError(
            f"pairs={pairs}: the longest prompt has {longest} tokens and its answer up to "
            f"{MAX_NEW_TOKENS}, but the model's context holds {limit}; take fewer pairs"
        )
    start = time.perf_counter()
    answers = ask(
        model,
        tokenizer,
        prompts,
        max_new_tokens=MAX_NEW_TOKENS,
        stop=("\n",),
        title=f"key-value, {pairs} pairs",
        cache=cache,
        whole=whole,
        progress=progress,
    )
    seconds = time.perf_counter() - start
    rows = []
    for index, (store, prompt) in enumerate(zip(stores, prompts, strict=True)):
        for i, pair in enumerate(store.asked):
            output = answers[index][i]
            rows.append(
                {
                    "store": index,
                    "key": pair.key,
                    "position": pair.position,
                    "depth": pair.position / pairs,
                    "expected": pair.value,
                    "output": output,
                    "correct": is_right(output, pair.value, form),
                    "prompt_tokens": len(prompt.prefix) + len(prompt.questions[i]),
                }
            )
    settings = {
        "form": form,
        "pairs": pairs,
        "questions": questions,
        "seed": seed,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    return accuracy_result("keyvalue", rows, seconds=seconds, settings=settings)


def _draw(form: str, pairs: int, rng: random.Random) -> tuple[Sequence[str], Sequence[str]]:
    """Keys and values, all different."""
    if form == "uuid":
        drawn = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2 * pairs)]
        return drawn[:pairs], drawn[pairs:]
    numbers = [str(number) for number in rng.sample(range(1000, 10_000), 2 * pairs)]
    keys = sample_pairs(rng, pairs) if form == "words" else numbers[:pairs]
    return keys, numbers[pairs:]
