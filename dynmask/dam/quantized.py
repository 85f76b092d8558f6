"""Keys in 4 bits: enough to say which blocks of them a decode step should look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_LEVELS = 15


@dataclass(frozen=True, eq=False)
class Quantized:
    """Blocks of keys, every channel of a block on 16 even steps between its least and its largest.

    ``k = low + step * code``. Two codes share a byte: channel ``d < D / 2`` has the low four bits,
    channel ``d + D / 2`` the high ones. With blocks of 64 that is 0.31 of the bytes of 16-bit keys.

    Attributes:
        codes: ``[B, G, n, block, D / 2]`` uint8.
        low: ``[B, G, n, D]`` float32.
        step: ``[B, G, n, D]`` float32.

    Source: a scale for each channel of keys, KIVI (arXiv 2402.02750), which attends to such keys;
    here they only choose.
    """

    codes: Tensor
    low: Tensor
    step: Tensor

    @classmethod
    def of(cls, blocks: Tensor) -> Quantized:
        """Quantize keys ``[B, G, n, block, D]``, ``D`` even."""
        wide = blocks.float()
        low, high = wide.aminmax(dim=3)
        step = (high - low) / _LEVELS
        # A channel of equal keys has no step: any code is right.
        codes = (wide - low.unsqueeze(3)) / step.masked_fill(step == 0, 1).unsqueeze(3)
        first, second = codes.round_().to(torch.uint8).chunk(2, -1)
        return cls(first | second << 4, low, step)

    def each(self, function: Callable[[Tensor], Tensor]) -> Quantized:
        """Return ``function`` of each tensor."""
        return Quantized(function(self.codes), function(self.low), function(self.step))

    def keys(self) -> Tensor:
        """Return the keys that the codes stand for, ``[B, G, n, block, D]`` float32."""
        codes = torch.cat([self.codes & 15, self.codes >> 4], -1)
        return self.low.unsqueeze(3) + self.step.unsqueeze(3) * codes
