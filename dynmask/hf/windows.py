"""Cut calibration texts into windows of the capture length, and split off the held-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynmask.hf.stream import Batch

MAX_WINDOWS_PER_TEXT = 16
"""Windows taken from one text, so that one long text does not outweigh all others."""


def make_windows(
    tokenizer: Any, texts: Sequence[str] | Sequence[Sequence[int]], capture_length: int
) -> list[Tensor]:
    """Cut texts into non-overlapping windows of at most ``capture_length`` tokens.

    A text gives its first 16 windows. A last, shorter window is kept if it has at least a quarter
    of ``capture_length``. Where the tokenizer begins a text with its BOS token, every window of the
    text begins with it, as every input of the model does.

    Args:
        tokenizer: A tokenizer of transformers; None if ``texts`` are token ids already.
        texts: Strings, or sequences of token ids.
        capture_length: ``L``, tokens.

    Returns:
        ``[n]`` int64 tensors, ``capture_length / 4 <= n <= capture_length``.

    Raises:
        ValueError: If there is no text, all are empty, none has ``capture_length`` tokens, or fewer
            than two windows come out.
    """
    if isinstance(texts, str) or len(texts) == 0:
        raise ValueError("texts must be a list of at least one calibration text")
    windows: list[Tensor] = []
    longest = 0
    for place, text in enumerate(texts):
        ids, bos = _token_ids(tokenizer, text, place)
        longest = max(longest, len(ids) + len(bos))
        step = capture_length - len(bos)
        for start in range(0, min(len(ids), MAX_WINDOWS_PER_TEXT * step), step):
            window = torch.cat([bos, ids[start : start + step]])
            if 4 * len(window) >= capture_length and len(window) > 1:
                windows.append(window)
    if longest == 0:
        raise ValueError("texts are all empty: give calibration texts with at least one token")
    if longest < capture_length:
        raise ValueError(
            f"texts are too short: the longest has {longest} tokens, capture_length is "
            f"{capture_length}. Give longer texts, or capture_length={longest} at most"
        )
    if len(windows) < 2:
        raise ValueError(
            f"texts are too short: they give {len(windows)} windows of capture_length="
            f"{capture_length} tokens (the longest text has {longest}), and calibration needs at "
            "least 2, one to capture and one held out. Give more or longer texts, or lower "
            "capture_length"
        )
    return windows


def split(windows: list[Tensor], holdout: float, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Split windows at random into calibration and held-out ones, at least one each.

    The longest window always goes to calibration: without it the last rows of the mean map would
    have no data.

    Args:
        windows: At least 2.
        holdout: Wanted share of held-out windows, in (0, 1).
        seed: Seed of the draw.

    Returns:
        Calibration windows and held-out windows, each in the given order.
    """
    count = len(windows)
    held = min(max(1, round(holdout * count)), count - 1)
    longest = max(range(count), key=lambda at: len(windows[at]))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    order.remove(longest)
    out = set(order[:held])
    return (
        [window for at, window in enumerate(windows) if at not in out],
        [window for at, window in enumerate(windows) if at in out],
    )


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


def _token_ids(tokenizer: Any, text: Any, place: int) -> tuple[Tensor, Tensor]:
    """Return a text's token ids without its BOS, and the BOS to put before each window."""
    nothing = torch.empty(0, dtype=torch.int64)
    if tokenizer is None:
        if isinstance(text, str):
            raise ValueError(f"texts[{place}] is a string: pass a tokenizer, or token ids")
        return torch.as_tensor(text, dtype=torch.int64).flatten(), nothing
    if not isinstance(text, str):
        raise ValueError(f"texts[{place}] is a {type(text).__name__}: with a tokenizer, pass str")
    # verbose: a text longer than the model's limit is meant to be cut here, not warned about.
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    bos = getattr(tokenizer, "bos_token_id", None)
    if len(ids) and bos is not None and ids[0] == bos:
        # A text of nothing but special tokens is empty.
        return ids[1:], ids[:1] if len(ids) > 1 else nothing
    return ids, nothing
