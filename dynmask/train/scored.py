"""Logits only where the loss needs them: of the positions before a token that weighs something.

Where a few answers of a long row count, logits ``[B, N, V]`` are nearly all of a small model's time
and memory, and most of them are multiplied by 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def scored_positions(weights: torch.Tensor) -> torch.Tensor | None:
    """Return ``[M]`` int64, places in the flattened rows from which a token of weight is predicted.

    Args:
        weights: ``[B, N]``, the weight of predicting the token that stands there.

    Returns:
        None where they are half of all or more: then nothing is gathered.
    """
    ahead = weights.roll(-1, dims=1)
    ahead[:, -1] = 0.0
    scored = ahead.flatten().nonzero()[:, 0]
    return scored if 2 * len(scored) < weights.numel() else None


class ScoredHead:
    """The output projection of a causal language model, which can be given some positions alone.

    Args:
        model: of transformers.

    Attributes:
        partial: whether any pass has left positions out.
    """

    def __init__(self, model: Any) -> None:
        self.partial = False
        self._at: torch.Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._gather)

    @contextmanager
    def only(self, scored: torch.Tensor | None) -> Iterator[None]:
        """In this context the model's logits are ``[1, M, V]``.

        Args:
            scored: ``[M]`` of `scored_positions`; None for the logits of all positions.
        """
        self._at = scored
        try:
            yield
        finally:
            self._at = None

    def _gather(self, head: torch.nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        if self._at is None:
            return given
        self.partial = True
        (hidden,) = given
        return (hidden.flatten(0, 1)[self._at][None],)
