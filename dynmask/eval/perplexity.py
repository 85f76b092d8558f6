"""Perplexity of long windows, in all and by position.

Source of the word-level figure: Rae et al., Compressive Transformers (PG-19), arXiv 1911.05507: the
exponential of the total loss over the number of words, which, like bits per byte, does not depend
on the tokenizer.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynmask.eval.nll import token_nll
from dynmask.eval.result import Z95, Part, Result
from dynmask.eval.runner import (
    Progress,
    context_length,
    encode,
    encode_prefix,
    evaluating,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Window:
    """One window: which text, which window of it, and its token ids."""

    text: int
    index: int
    ids: tuple[int, ...]


def make_windows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    length: int,
    windows: int | None = None,
) -> list[Window]:
    """Non-overlapping windows of `length` tokens: the first of each text, then the second, ...

    What is left at a text's end is not used. If the tokenizer puts special tokens in front of a
    text, each window starts with them, and they count towards `length`.

    Args:
        tokenizer: cuts the texts.
        texts: any texts; those shorter than a window give none.
        length: tokens of a window, at least 2.
        windows: how many; None takes all there are.

    Raises:
        ValueError: a setting is out of its range, or the texts hold too few windows.
    """
    if windows is not None and windows < 1:
        raise ValueError(f"windows={windows} must be at least 1, or None for all")
    special = encode_prefix(tokenizer, "")
    step = length - len(special)
    if length < 2 or step < 1:
        raise ValueError(
            f"length={length} must be at least 2 and more than the {len(special)} special tokens"
        )
    if isinstance(texts, str):
        raise ValueError("texts must be a list of texts, got one string: give [text]")
    tokens = [encode(tokenizer, text) for text in texts]
    longest = max(map(len, tokens), default=0)
    if longest < step:
        raise ValueError(
            f"texts are too short: the longest has {longest} tokens, a window length={length}; "
            f"give longer texts or a smaller length"
        )
    cut = [
        Window(text, index, (*special, *ids[index * step : (index + 1) * step]))
        for index in range(longest // step)
        for text, ids in enumerate(tokens)
        if (index + 1) * step <= len(ids)
    ]
    if windows is not None and windows > len(cut):
        raise ValueError(
            f"windows={windows}, but the texts hold {len(cut)} of length={length}; give more text"
        )
    return cut[:windows]


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    length: int = 8192,
    windows: int | None = None,
    bucket: int = 1024,
    progress: Progress | None = None,
) -> Result:
    """Perplexity of non-overlapping windows, each read by itself in one forward.

    With m the mean loss in nats over all predicted tokens, T the tokens of the windows and W and B
    the words and bytes they spell: perplexity = exp(m), word perplexity = exp(m T / W), bits per
    byte = m T / (B ln 2). A window's first token has nothing before it and is not predicted; m
    stands for it in T.

    Args:
        model: any causal language model of transformers, run as it is.
        tokenizer: the model's tokenizer.
        texts: long texts that the model was not trained on.
        length: tokens of a window, at most the model's context.
        windows: how many, taken from all texts in turn; None takes all.
        bucket: positions of one part of the result.
        progress: called after each window.

    Returns:
        Token perplexity; by position; metrics ``nll`` (nats a token), ``bits_per_byte``,
        ``word_perplexity``, ``tokens``, ``words``, ``bytes``; one row for each window. For the
        positions 0 to 1K, 1K to 2K, 2K to 4K and so on, doubling, there are three more metrics and
        one more figure in each row: ``nll_1K-2K`` is the mean loss, ``nll_1K-2K_error`` its
        standard error over the windows (from two windows on), ``tokens_1K-2K`` how many tokens were
        predicted. The scatter of windows is mostly that of the texts; compare two runs on the same
        windows by the differences of their rows.

    Raises:
        ValueError: a setting is out of its range, `length` is over the model's context, or the
            texts are too short.
    """
    if bucket < 1:
        raise ValueError(f"bucket={bucket} must be at least 1")
    limit = context_length(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"length={length} is over the model's context of {limit} tokens; take at most that"
        )
    cut = make_windows(tokenizer, texts, length=length, windows=windows)
    special = len(encode_prefix(tokenizer, ""))
    words, size = _spelled(tokenizer, cut, special)
    tokens = len(cut) * (length - special)
    losses = []
    start = time.perf_counter()
    with evaluating(model):
        for done, window in enumerate(cut, 1):
            losses.append(token_nll(model, window.ids).double())
            if progress is not None:
                progress(done, len(cut), f"perplexity of {length} tokens")
    seconds = time.perf_counter() - start
    nll = torch.stack(losses)  # [windows, length - 1]; column i predicts position i + 1
    means = nll.mean(1).tolist()
    mean = statistics.fmean(means)
    octaves = _by_octave(nll)
    return Result(
        task="perplexity",
        metric="perplexity",
        n=len(cut),
        score=math.exp(mean),
        interval=_interval(means),
        parts=tuple(_by_position(nll, bucket)),
        prompt_tokens=float(length),
        seconds=seconds,
        settings={"length": length, "windows": len(cut), "bucket": bucket},
        metrics={
            "nll": mean,
            "bits_per_byte": mean * tokens / (size * math.log(2)),
            "word_perplexity": math.exp(mean * tokens / words),
            "tokens": tokens,
            "words": words,
            "bytes": size,
            **_octave_metrics(octaves),
        },
        rows=tuple(
            {
                "text": window.text,
                "window": window.index,
                "nll": value,
                "perplexity": math.exp(value),
                **{f"nll_{label}": losses[row] for label, (_, losses) in octaves.items()},
            }
            for row, (window, value) in enumerate(zip(cut, means, strict=True))
        ),
    )


def _spelled(
    tokenizer: PreTrainedTokenizerBase, windows: Sequence[Window], special: int
) -> tuple[int, int]:
    """Words (divided by white space) and UTF-8 bytes of the windows, each text's joined up."""
    runs: dict[int, list[int]] = {}
    for window in windows:
        runs.setdefault(window.text, []).extend(window.ids[special:])
    spelled = [
        str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in runs.values()
    ]
    words, size = (
        sum(len(text.split()) for text in spelled),
        sum(len(text.encode()) for text in spelled),
    )
    if not words:
        raise ValueError("texts hold no words: give running text")
    return words, size


def _interval(means: Sequence[float]) -> tuple[float, float] | None:
    if len(means) < 2:
        return None
    mean = statistics.fmean(means)
    half = Z95 * statistics.stdev(means) / math.sqrt(len(means))
    return math.exp(mean - half), math.exp(mean + half)


def _by_position(nll: Tensor, bucket: int) -> Iterator[Part]:
    length = nll.shape[1] + 1
    for start in range(0, length, bucket):
        stop = min(start + bucket, length)
        part = _between(nll, start, stop)
        if part.numel():
            yield Part(
                f"{_short(start)}-{_short(stop)}", part.numel(), math.exp(part.mean().item())
            )


def _by_octave(nll: Tensor) -> dict[str, tuple[int, list[float]]]:
    """For the positions 0 to 1K, 1K to 2K, ...: predicted tokens, and each window's mean loss."""
    length, start, stop = nll.shape[1] + 1, 0, 1024
    octaves = {}
    while start < length:
        end = min(stop, length)
        part = _between(nll, start, end)
        octaves[f"{_short(start)}-{_short(end)}"] = (part.numel(), part.mean(1).tolist())
        start, stop = stop, 2 * stop
    return octaves


def _octave_metrics(octaves: Mapping[str, tuple[int, Sequence[float]]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for label, (tokens, losses) in octaves.items():
        metrics[f"nll_{label}"] = statistics.fmean(losses)
        if len(losses) > 1:
            metrics[f"nll_{label}_error"] = statistics.stdev(losses) / math.sqrt(len(losses))
        metrics[f"tokens_{label}"] = tokens
    return metrics


def _between(nll: Tensor, start: int, stop: int) -> Tensor:
    """The losses of the tokens at positions `start` to `stop` - 1; position 0 has none."""
    return nll[:, max(start - 1, 0) : stop - 1]


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens and tokens % 1024 == 0 else str(tokens)
