"""Split calibration texts into those that calibrate and those held out, and cut both to windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynmask.hf.stream import Batch

MAX_WINDOWS_PER_TEXT = 16
"""Capture lengths taken from one text, so that one long text does not outweigh all others."""


class Text(NamedTuple):
    """Token ids of one text.

    Attributes:
        ids: ``[n]`` int64, without the BOS token.
        bos: ``[0 or 1]`` int64, the BOS token where the tokenizer begins a text with one; every
            window of the text begins with it, as every input of the model does.
    """

    ids: Tensor
    bos: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens, BOS included; 0 for an empty text."""
        return len(self.ids) + len(self.bos)


def make_windows(
    tokenizer: Any,
    texts: Sequence[str] | Sequence[Sequence[int]],
    *,
    capture_length: int,
    coverage_length: int,
    holdout: float,
    seed: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Make calibration windows and held-out windows; no text is in both, unless it is the only one.

    Of each text the first 16 ``capture_length`` tokens are used (``coverage_length`` if that is
    more). Windows do not overlap; a text's last, shorter one is kept if it has at least a quarter
    of ``capture_length``.

    Args:
        tokenizer: A tokenizer of transformers; None if ``texts`` are token ids already.
        texts: Strings, or sequences of token ids.
        capture_length: ``L``, most tokens of a calibration window.
        coverage_length: Most tokens of a held-out window, at least ``L``.
        holdout: Wanted share of held-out tokens, in (0, 1).
        seed: Seed of the split.

    Returns:
        Calibration windows and held-out windows, ``[n]`` int64, each at least one, in the order of
        the texts.

    Raises:
        ValueError: If there is no text, all are empty, none has ``capture_length`` tokens, or
            nothing is left to hold out.
    """
    most = max(MAX_WINDOWS_PER_TEXT * capture_length, coverage_length)
    kept, held = split(
        [Text(ids[: most - len(bos)], bos) for ids, bos in read(tokenizer, texts)],
        capture_length=capture_length,
        holdout=holdout,
        seed=seed,
    )
    least = least_tokens(capture_length)
    return cut(kept, capture_length, least=least), cut(held, coverage_length, least=least)


def read(tokenizer: Any, texts: Sequence[str] | Sequence[Sequence[int]]) -> list[Text]:
    """Tokenize texts.

    Raises:
        ValueError: If there is no text, or one is of the wrong type.
    """
    if texts is None or isinstance(texts, str) or len(texts) == 0:
        raise ValueError("texts must be a list of at least one calibration text")
    if tokenizer is not None and not callable(tokenizer):
        raise ValueError(
            f"tokenizer must be a loaded one, got {type(tokenizer).__name__}: "
            "AutoTokenizer.from_pretrained(name)"
        )
    return [_read_one(tokenizer, text, place) for place, text in enumerate(texts)]


def least_tokens(capture_length: int) -> int:
    """Return the fewest tokens of a window: a quarter of the capture length, and more than one."""
    return max(2, (capture_length + 3) // 4)


def split(
    texts: list[Text], *, capture_length: int, holdout: float, seed: int
) -> tuple[list[Text], list[Text]]:
    """Split texts at random into calibration and held-out ones, at least one each.

    Whole texts are held out, so that held-out windows can be longer than ``capture_length``. In
    random order, but texts longer than ``capture_length`` first, each is held out that brings the
    held-out tokens nearer to their wanted share; if none does, the shortest is. One text that fills
    ``capture_length`` always calibrates: without it the last rows of the mean map would have no
    data. Texts too short for a window are left out.

    A single text is split itself: its end is held out, at least ``capture_length`` tokens if it
    has twice that.

    Args:
        texts: The texts.
        capture_length: ``L``, tokens.
        holdout: Wanted share of held-out tokens, in (0, 1).
        seed: Seed of the draw.

    Returns:
        Calibration texts and held-out texts, each in the given order.

    Raises:
        ValueError: If all texts are empty, none has ``capture_length`` tokens, or the only one has
            nothing left to hold out.
    """
    longest = max(text.tokens for text in texts)
    if longest == 0:
        raise ValueError("texts are all empty: give calibration texts with at least one token")
    if longest < capture_length:
        raise ValueError(
            f"texts are too short: the longest has {longest} tokens, capture_length is "
            f"{capture_length}. Give longer texts, or capture_length={longest} at most"
        )
    texts = [text for text in texts if text.tokens >= least_tokens(capture_length)]
    if len(texts) == 1:
        start, end = _split_one(texts[0], capture_length, holdout)
        return [start], [end]
    tokens = [text.tokens for text in texts]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    order.remove(next(at for at in order if tokens[at] >= capture_length))
    order.sort(key=lambda at: tokens[at] <= capture_length)
    out: set[int] = set()
    missing = holdout * sum(tokens)
    for at in order:
        if abs(missing - tokens[at]) < abs(missing):
            out.add(at)
            missing -= tokens[at]
    out = out or {min(order, key=lambda at: tokens[at])}
    return (
        [text for at, text in enumerate(texts) if at not in out],
        [text for at, text in enumerate(texts) if at in out],
    )


def cut(texts: list[Text], length: int, *, least: int) -> list[Tensor]:
    """Cut texts into non-overlapping windows of ``least`` to ``length`` tokens, BOS included."""
    windows = [
        torch.cat([bos, part]) for ids, bos in texts for part in ids.split(length - len(bos))
    ]
    return [window for window in windows if len(window) >= least]


def make_batches(windows: list[Tensor], batch_size: int) -> list[Batch]:
    """Group windows of like length and pad them on the right (token 0, masked).

    Args:
        windows: ``[n]`` int64 tensors.
        batch_size: Most windows in one batch.
    """
    by_length = sorted(windows, key=len, reverse=True)
    batches = []
    for start in range(0, len(by_length), batch_size):
        part = by_length[start : start + batch_size]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        batches.append(Batch(ids, torch.tensor([len(window) for window in part])))
    return batches


def _split_one(text: Text, capture_length: int, holdout: float) -> tuple[Text, Text]:
    """Split a text into its start, at least a full window, and its end."""
    ids, bos = text
    full = capture_length - len(bos)
    least = least_tokens(capture_length) - len(bos)
    if len(ids) < full + least:
        raise ValueError(
            f"texts are too short: the only one of use has {text.tokens} tokens, and calibration "
            f"needs capture_length={capture_length} to capture and {least} more to hold out. Give "
            "more or longer texts, or lower capture_length"
        )
    wanted = round(holdout * len(ids))
    if len(ids) >= 2 * full:
        wanted = max(wanted, full)
    held = max(least, min(wanted, len(ids) - full))
    return Text(ids[:-held], bos), Text(ids[-held:], bos)


def _read_one(tokenizer: Any, text: Any, place: int) -> Text:
    nothing = torch.empty(0, dtype=torch.int64)
    if tokenizer is None:
        if isinstance(text, str):
            raise ValueError(f"texts[{place}] is a string: pass a tokenizer, or token ids")
        return Text(torch.as_tensor(text, dtype=torch.int64).flatten(), nothing)
    if not isinstance(text, str):
        raise ValueError(f"texts[{place}] is a {type(text).__name__}: with a tokenizer, pass str")
    # verbose: a text longer than the model's limit is meant to be cut here, not warned about.
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    bos = getattr(tokenizer, "bos_token_id", None)
    if len(ids) and bos is not None and ids[0] == bos:
        # A text of nothing but special tokens is empty.
        return Text(ids[1:], ids[:1] if len(ids) > 1 else nothing)
    return Text(ids, nothing)
