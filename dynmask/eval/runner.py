"""Ask many questions of one prefill.

The prefix (a record, a haystack) is read once into a KV cache. Each question then runs as one chunk
on that cache, is decoded greedily, and the cache is cropped back to the prefix. Attention is
causal, so the prefix's keys and values do not depend on what follows, and every answer is the one
that the whole prompt by itself would give (up to the rounding of a chunked product).

Prefix and question are tokenised apart and their ids joined: the prefix with the special tokens
that the tokenizer puts in front of a text, the question with none. A tokenizer may merge across the
joint if given the joined string; here it never does, so that one prefill serves every question.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int, str], None]
"""Called as ``progress(done, total, text)`` after each step."""


@dataclass(frozen=True)
class Prompt:
    """One prefix and the questions asked of it, as token ids."""

    prefix: Sequence[int]
    questions: Sequence[Sequence[int]]

    @property
    def tokens(self) -> int:
        """Tokens of the prefix and its longest question."""
        return len(self.prefix) + max(len(question) for question in self.questions)


def encode_prefix(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of the start of a prompt: the tokenizer's leading special tokens, then the text.

    A closing end-of-sequence token, which some tokenizers append, is left off: the prompt goes on.
    """
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    plain = encode(tokenizer, text)
    return ids[:-1] if len(ids) > len(plain) and ids[-1] == tokenizer.eos_token_id else ids


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that continues a prompt: no special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def context_length(model: PreTrainedModel) -> int | None:
    """The most positions the model's configuration allows, or None if it names no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model takes its token ids: the device of its embedding."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.device


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """No gradients and no dropout inside the block; puts the training flag back after it."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class Prefill:
    """A prefix read once, ready for any number of questions.

    Args:
        model: any causal language model of transformers whose cache is keys and values, or a DMA
            model.
        prefix: token ids, read whole in one forward.
        cache: what the tokens go into; by default one that can be cropped back to the prefix.

    Raises:
        ValueError: the prefix is empty.
    """

    def __init__(
        self, model: PreTrainedModel, prefix: Sequence[int], *, cache: Cache | None = None
    ) -> None:
        if not prefix:
            raise ValueError("prefix is empty: give at least one token")
        self._model = model
        self._length = len(prefix)
        self._cache = croppable_cache(model) if cache is None else cache
        self._last_only = logits_for_last(model)
        self._next = self._forward(prefix)

    def _forward(self, ids: Sequence[int]) -> Tensor:
        output = self._model(
            input_ids=torch.tensor([list(ids)], device=input_device(self._model)),
            past_key_values=self._cache,
            use_cache=True,
            **self._last_only,
        )
        return output.logits[0, -1]

    @contextmanager
    def _cropped(self) -> Iterator[None]:
        """Take the tokens of the block out of the cache after it."""
        if self._model.config.model_type == "dma":
            self._cache.activate_past_recording()  # Else it would evict for good.
        try:
            yield
        finally:
            self._cache.crop(self._length - self._cache.get_seq_length())

    def logits(self, question: Sequence[int]) -> Tensor:
        """The logits of the token after prefix and question, [V]."""
        with self._cropped():
            return self._forward(question)

    def greedy(
        self, question: Sequence[int], *, max_new_tokens: int, done: Callable[[list[int]], bool]
    ) -> list[int]:
        """The tokens that greedy decoding puts after prefix and question.

        Args:
            question: token ids, at least one.
            max_new_tokens: stop after this many.
            done: called with the tokens so far after each; True stops.
        """
        if not question:
            raise ValueError("question is empty: give at least one token")
        with self._cropped():
            return self._decode(self._forward(question), max_new_tokens, done)

    def go_on(self, *, max_new_tokens: int, done: Callable[[list[int]], bool]) -> list[int]:
        """The tokens that greedy decoding puts after the prefix, which stay in the cache.

        Args:
            max_new_tokens: stop after this many.
            done: called with the tokens so far after each; True stops.
        """
        return self._decode(self._next, max_new_tokens, done)

    def _decode(
        self, logits: Tensor, max_new_tokens: int, done: Callable[[list[int]], bool]
    ) -> list[int]:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        tokens: list[int] = []
        while True:
            tokens.append(int(logits.argmax()))
            if len(tokens) == max_new_tokens or done(tokens):
                return tokens
            logits = self._forward(tokens[-1:])


def croppable_cache(model: PreTrainedModel) -> Cache:
    """A new cache that `Prefill` can crop back: a `LifetimeCache` for DMA models."""
    from transformers import DynamicCache

    if model.config.model_type == "dma":
        from dynmask.dma import LifetimeCache

        return LifetimeCache(model.config)
    # Built without the configuration: every layer then keeps all its keys, so that sliding-window
    # layers, too, can be cropped back. The model's mask still hides what lies outside the window.
    return DynamicCache()


def logits_for_last(model: PreTrainedModel) -> dict[str, Any]:
    """What tells a forward to compute the last logits only; {} if it knows no such argument."""
    known = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    title: str = "questions",
    cache: Callable[[], Cache] | None = None,
    whole: bool = False,
    progress: Progress | None = None,
) -> list[list[str]]:
    """Answer every question of every prompt greedily.

    Args:
        model: any causal language model of transformers.
        tokenizer: turns the answer's tokens into text.
        prompts: what to ask; at least one.
        max_new_tokens: the most tokens of an answer.
        stop: strings that end an answer, looked for after its leading white space; the answer
            includes them. The model's and the tokenizer's end-of-sequence tokens always end it.
        title: what `progress` is told.
        cache: makes the caches, by default `croppable_cache`.
        whole: read each question together with its prefix in one forward, on a cache of its own:
            for caches that look at the question to decide what they keep, and cannot be cropped.
        progress: called after each question.

    Returns:
        The answers' texts, without special tokens, in the shape of `prompts`.

    Raises:
        ValueError: a prompt and its answer do not fit the model's context.
    """
    limit, longest = context_length(model), max(prompt.tokens for prompt in prompts)
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f"the longest prompt has {longest} tokens and its answer up to {max_new_tokens}, but "
            f"the model's context holds {limit}: ask for fewer lines or a smaller length"
        )
    ends = _end_ids(model, tokenizer)

    def text(tokens: list[int]) -> str:
        return str(
            tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def done(tokens: list[int]) -> bool:
        said = text(tokens).lstrip()
        return tokens[-1] in ends or any(string in said for string in stop)

    def made() -> Cache:
        return croppable_cache(model) if cache is None else cache()

    answers: list[list[str]] = []
    total = sum(len(prompt.questions) for prompt in prompts)
    asked = 0
    with evaluating(model):
        for prompt in prompts:
            prefill = None if whole else Prefill(model, prompt.prefix, cache=made())
            answers.append([])
            for question in prompt.questions:
                if prefill is not None:
                    tokens = prefill.greedy(question, max_new_tokens=max_new_tokens, done=done)
                else:
                    alone = Prefill(model, [*prompt.prefix, *question], cache=made())
                    tokens = alone.go_on(max_new_tokens=max_new_tokens, done=done)
                answers[-1].append(text(tokens))
                asked += 1
                if progress is not None:
                    progress(asked, total, title)
    return answers


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ends: set[int] = set()
    config = getattr(model, "generation_config", None)
    for ids in (tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
        if ids is not None:
            ends.update([ids] if isinstance(ids, int) else ids)
    return ends
