"""Softmax over rows of masked logits, in place."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_(logits: Tensor) -> None:
    """Turn ``[.., n]`` logits into weights; every row must have a finite one."""
    torch.softmax(logits, -1, out=logits)


def softmax_with_lse_(logits: Tensor) -> Tensor:
    """Turn ``[.., n]`` logits into weights and return their log-sum-exp ``[..]``.

    A row of -inf gets weights 0 and log-sum-exp -inf.
    """
    largest = logits.amax(-1)
    softmax_(logits)
    empty = largest == float("-inf")
    logits.masked_fill_(empty[..., None], 0)
    # The largest logit's weight is 1 / sum.
    return (largest - logits.amax(-1).log()).masked_fill_(empty, float("-inf"))
