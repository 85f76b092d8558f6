"""Accumulate attention maps of one layer over calibration texts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class MapAccumulator:
    """Running sum of one layer's attention probabilities, aligned to each text's first token.

    `mean = sum / (count + eps)` with `sum[h, i, j]` over the texts that have a token i, and
    `count[i]` the number of those texts: a causal pair (i, j), j <= i, is there exactly when i is.
    Memory is one `[H, L, L]` float32 map, and a second one for `mean()`; a layer too large for
    that can be taken in groups of heads, one accumulator each.

    Args:
        heads: H, attention heads of the layer.
        length: L, the capture length; tokens of a text beyond it are ignored.
        device: Where the sums live; probabilities are moved there.
        eps: Guard of the division for rows that no text reaches.

    Attributes:
        sum: `[H, L, L]` float32.
        count: `[L]` int64 on the CPU.
    """

    def __init__(
        self,
        heads: int,
        length: int,
        *,
        device: torch.device | str | None = None,
        eps: float = 1e-10,
    ) -> None:
        if heads < 1 or length < 2:
            raise ValueError(f"heads={heads} must be at least 1 and length={length} at least 2")
        self.eps = eps
        self.sum = torch.zeros(heads, length, length, device=device)
        self.count = torch.zeros(length, dtype=torch.int64)

    def add(self, probs: Tensor, start: Tensor, stop: Tensor) -> None:
        """Add a batch.

        Args:
            probs: `[B, H, T, T]` attention probabilities after the softmax, any float type, any T.
            start: `[B]` integers, each row's first real token (left padding before it).
            stop: `[B]` integers, one past each row's last real token (right padding after it).

        Raises:
            ValueError: Shapes do not fit, or a run lies outside the batch.
        """
        heads, length = self.sum.shape[:2]
        for text_HNN in texts_of(probs, start, stop, heads=heads):
            # Causal: the first L rows of a longer text do not know of the rest.
            size = min(text_HNN.shape[-1], length)
            self.sum[:, :size, :size] += text_HNN[:, :size, :size].detach().to(self.sum.device)
            self.count[:size] += 1

    def mean(self) -> Tensor:
        """Return the mean map, `[H, L, L]` float32; rows that no text reaches are 0."""
        weight_L = (self.count.to(torch.float32) + self.eps).to(self.sum.device)
        return self.sum / weight_L[:, None]


def texts_of(probs: Tensor, start: Tensor, stop: Tensor, *, heads: int) -> Iterator[Tensor]:
    """Yield each batch row's own square of a padded attention map.

    Args:
        probs: `[B, H, T, T]`.
        start: `[B]` integers, first real token.
        stop: `[B]` integers, one past the last real token.
        heads: H that is expected.

    Yields:
        `[H, N, N]` views with `N = stop - start`; rows without tokens are left out.

    Raises:
        ValueError: Shapes do not fit, or not `0 <= start <= stop <= T`.
    """
    if probs.ndim != 4 or probs.shape[1] != heads or probs.shape[-1] != probs.shape[-2]:
        raise ValueError(f"probs must be [B, {heads}, T, T], got {list(probs.shape)}")
    batch, _, size, _ = probs.shape
    if start.shape != (batch,) or stop.shape != (batch,):
        raise ValueError(
            f"start and stop must be [B] with B={batch}, got {list(start.shape)} and"
            f" {list(stop.shape)}"
        )
    for row, (first, last) in enumerate(zip(start.tolist(), stop.tolist(), strict=True)):
        if not 0 <= first <= last <= size:
            raise ValueError(
                f"row {row}: start={first}, stop={last} must satisfy 0 <= start <= stop <= {size}"
            )
        if first < last:
            yield probs[row, :, first:last, first:last]
