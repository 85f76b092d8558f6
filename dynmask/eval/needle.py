"""Needles in a haystack: numbers hidden in a book, asked for at the end.

Sources: microsoft/MInference (string rule, magic city numbers), NVIDIA/RULER (task `niah`), and G.
    Kamradt's LLMTest_NeedleInAHaystack for the placing: at a depth, moved back to the end of the
    sentence before it.
"""

from __future__ import annotations

import random
import re
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynmask.eval import prompts
from dynmask.eval.result import Result, accuracy_result
from dynmask.eval.runner import Progress, Prompt, ask, context_length, encode, encode_prefix
from dynmask.eval.words import sample_pairs, sample_words

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 32
"""Tokens of an answer; they count towards `length`."""

_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s)")


@dataclass(frozen=True)
class Needle:
    """A hidden number: key, seven digits, and where it lies (0 start, 1 end of the haystack)."""

    key: str
    number: int
    depth: float


@dataclass(frozen=True)
class Haystack:
    """A prompt's prefix with its needles, and the same as token ids."""

    text: str
    ids: tuple[int, ...]
    needles: tuple[Needle, ...]


@dataclass(frozen=True)
class Form:
    """A way to hide and ask: keys, the text before the haystack, texts of needle and question."""

    keys: Callable[[random.Random, int], list[str]]
    header: str
    needle: Callable[[str, int], str]
    question: Callable[[str], str]


FORMS: dict[str, Form] = {
    "minference": Form(sample_words, "", prompts.city_needle, prompts.city_question),
    # RULER's needle is a sentence among sentences: a space divides it from the one before.
    "ruler": Form(
        sample_pairs,
        prompts.RULER_HEADER,
        lambda key, number: " " + prompts.ruler_needle(key, number),
        prompts.ruler_question,
    ),
}
"""`minference`: a line ``The special magic {word} number is: ...``; `ruler`: a sentence ``One of
the special magic numbers for {word-word} is: ...``."""


def sentence_end_before(text: str, position: int) -> int:
    """The end of the last sentence that ends at or before `position`; 0 if none does."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    index = bisect_right(ends, position)
    return ends[index - 1] if index else 0


def place(text: str, needles: Sequence[str], depths: Sequence[float]) -> tuple[str, list[float]]:
    """Put each needle at its depth of the text, moved back to the end of the sentence before.

    Args:
        text: the haystack.
        needles: texts, put in as they are.
        depths: for each needle, 0 (start) to 1 (end), in characters of the bare haystack;
            ascending.

    Returns:
        The text with its needles, and the depths at which they lie after moving back.
    """
    places = [sentence_end_before(text, int(depth * len(text))) for depth in depths]
    pieces, last = [], 0
    for position, needle in zip(places, needles, strict=True):
        pieces += [text[last:position], needle]
        last = position
    return "".join([*pieces, text[last:]]), [position / len(text) for position in places]


def make_haystack(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    length: int,
    needles: int,
    rng: random.Random,
    form: str = "minference",
) -> Haystack:
    """A haystack with needles that fits `length` tokens with its longest question and answer.

    The haystack starts after a random sentence of a random text and goes on into the next texts.
    Each needle is drawn from its own one of `needles` equal stretches of the depth.

    Args:
        tokenizer: counts the tokens.
        texts: what haystacks are cut from.
        length: tokens of the whole prompt with room for the answer.
        needles: numbers to hide.
        rng: of place, keys, numbers and depths.
        form: a name in `FORMS`.

    Raises:
        ValueError: `length` leaves no room for the needles, or the texts are too short for it.
    """
    rule = FORMS[form]
    keys = rule.keys(rng, needles)
    numbers = rng.sample(range(1_000_000, 10_000_000), needles)
    depths = [(i + rng.random()) / needles for i in range(needles)]
    strings = [rule.needle(key, number) for key, number in zip(keys, numbers, strict=True)]
    material = running_text(texts, rng)
    question = max(len(encode(tokenizer, rule.question(key))) for key in keys)
    room = length - MAX_NEW_TOKENS - question
    budget = room - sum(len(encode(tokenizer, text)) for text in [rule.header, *strings])
    while budget > 0:
        bare = cut_to(tokenizer, material, budget)
        text, places = place(bare, strings, depths)
        ids = encode_prefix(tokenizer, rule.header + text)
        if len(ids) <= room:
            hidden = tuple(map(Needle, keys, numbers, places))
            return Haystack(rule.header + text, tuple(ids), hidden)
        # Cutting in and putting in needles changes the tokens at the joints; take off what it cost.
        budget -= len(ids) - room
    raise ValueError(
        f"length={length} has no room for {needles} needles, a question and an answer of "
        f"{MAX_NEW_TOKENS} tokens: take a greater length or fewer needles"
    )


def needle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    length: int = 8192,
    n: int = 50,
    needles: int = 5,
    seed: int = 0,
    form: str = "minference",
    cache: Callable[[], Cache] | None = None,
    whole: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Accuracy of finding a number that is hidden in running text.

    A question is right if the number's digits stand in the greedy output, of at most 32 tokens and
    no further than the end of its first line.

    Args:
        model: any causal language model of transformers, run as it is.
        tokenizer: the model's tokenizer.
        texts: what haystacks are cut from; no text that the model was trained on.
        length: tokens of the whole prompt, question and room for the answer included.
        n: questions in all.
        needles: needles of one haystack, each asked for; they share its prefill. The last haystack
            holds as many but is asked for fewer if `n` is not a multiple.
        seed: of haystacks, keys, numbers and depths.
        form: ``"minference"`` or ``"ruler"``.
        cache: makes the caches, by default ones that every question can be cropped from.
        whole: read each question with its prompt in one forward: for caches and methods that look
            at the question to decide what they keep.
        progress: called after each question.

    Returns:
        Accuracy with Wilson's 95 % interval, by ten bins of depth, and one row for each question.

    Raises:
        ValueError: a setting is out of its range, `length` is over the model's context, or the
            texts are too short.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is unknown; choose one of {', '.join(FORMS)}")
    for name, value in (("n", n), ("needles", needles), ("length", length)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    limit = context_length(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"length={length} is over the model's context of {limit} tokens; take at most that"
        )
    haystacks, asked = [], []
    for index, first in enumerate(range(0, n, needles)):
        rng = random.Random(f"needle-{form}-{length}-{seed}-{index}")
        haystack = make_haystack(
            tokenizer, texts, length=length, needles=needles, rng=rng, form=form
        )
        chosen = sorted(rng.sample(range(needles), min(needles, n - first)))
        haystacks.append([haystack.needles[i] for i in chosen])
        questions = [
            encode(tokenizer, FORMS[form].question(hidden.key)) for hidden in haystacks[-1]
        ]
        asked.append(Prompt(haystack.ids, questions))
    start = time.perf_counter()
    answers = ask(
        model,
        tokenizer,
        asked,
        max_new_tokens=MAX_NEW_TOKENS,
        stop=("\n",),
        title=f"needles in {length} tokens",
        cache=cache,
        whole=whole,
        progress=progress,
    )
    seconds = time.perf_counter() - start
    rows = [
        {
            "haystack": index,
            "key": hidden.key,
            "depth": hidden.depth,
            "expected": hidden.number,
            "output": answers[index][i],
            "correct": str(hidden.number) in answers[index][i],
            "prompt_tokens": len(asked[index].prefix) + len(asked[index].questions[i]),
        }
        for index, chosen in enumerate(haystacks)
        for i, hidden in enumerate(chosen)
    ]
    settings = {
        "form": form,
        "length": length,
        "needles": needles,
        "seed": seed,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    return accuracy_result("needle", rows, seconds=seconds, settings=settings)


def running_text(texts: Sequence[str], rng: random.Random) -> str:
    """All texts end to end, turned so that it starts after a random sentence."""
    if isinstance(texts, str):
        raise ValueError("texts must be a list of texts, got one string: give [text]")
    if not any(text.strip() for text in texts):
        raise ValueError("texts is empty: give at least one text to cut haystacks from")
    first = rng.randrange(len(texts))
    start = sentence_end_before(texts[first], rng.randrange(len(texts[first]) or 1))
    later = [*texts[first + 1 :], *texts[:first]]
    return "\n\n".join([texts[first][start:], *later, texts[first][:start]]).strip()


def cut_to(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> str:
    """The start of `text` that has `tokens` tokens, less a character split at its end."""
    characters = 8 * tokens
    while True:
        ids = encode(tokenizer, text[:characters])
        if len(ids) >= tokens:
            cut = tokenizer.decode(ids[:tokens], clean_up_tokenization_spaces=False)
            return str(cut).rstrip("\ufffd")
        if characters >= len(text):
            raise ValueError(
                f"texts have {len(ids)} tokens, but a haystack needs {tokens}: "
                f"give more text or take a smaller length"
            )
        characters *= 2
