"""Keys and values with a summary of every block in front of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dynmask.dam.kernels import by_kernels
from dynmask.dam.landmarks import landmarks
from dynmask.ops.reference import accumulation_dtype


@dataclass(frozen=True, eq=False)
class Keys:
    """Summaries in the first slots, then the keys themselves.

    Slot ``J`` holds the mean of the keys of block ``J`` and the mean of its values, and slot
    ``summaries + j`` key ``j``. Slots between the last summary and the first key are zeros that
    nobody may see; they make ``summaries`` a multiple of the tile, so that tiles of positions are
    tiles of slots.

    Attributes:
        landmarks: ``[B, G, L, n, D]``, ``L`` of each of the ``n`` whole blocks, see `landmarks`.
        k: ``[B, G, summaries + K, D]``.
        v: ``[B, G, summaries + K, D]``.
        bias: ``[B, G, summaries + K]`` float32, or float64 for float64 keys: ``log(block)`` for a
            summary, which stands for ``block`` keys of its own logit, and 0 for a key.
        block: Keys of a block.
        summaries: Slots before the first key.
    """

    landmarks: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    block: int
    summaries: int

    @classmethod
    def build(cls, k: Tensor, v: Tensor, *, block: int, tile: int, marks: int) -> Keys:
        """Summarise every whole block of ``k [B, G, K, D]`` and ``v``; ``marks`` landmarks each."""
        batch, groups, k_len, _ = k.shape
        count = k_len // block
        front = -(-count // tile) * tile

        find = by_kernels(k, "landmarks", cells=block * k.shape[3]) or landmarks

        def in_blocks(source: Tensor) -> Tensor:
            return source[:, :, : count * block].unflatten(2, (count, block))

        def with_summaries(source: Tensor) -> Tensor:
            # Sums of half floats are taken in float32 by torch.
            means = in_blocks(source).mean(3)
            empty = source.new_zeros(batch, groups, front - count, source.shape[3])
            return torch.cat([means, empty, source], 2)

        bias = torch.zeros(front + k_len, dtype=accumulation_dtype(k.dtype), device=k.device)
        bias[:count] = math.log(block)
        return cls(
            find(in_blocks(k).detach(), marks)[0],
            with_summaries(k),
            with_summaries(v),
            bias.expand(batch, groups, -1),
            block,
            front,
        )

    def means(self, blocks: int) -> Tensor:
        """Return ``[B, G, blocks, D]``, the mean keys of the first blocks."""
        return self.k[:, :, :blocks]

    def tokens(self, first: int, last: int) -> Tensor:
        """Return ``[B, G, last - first, D]``, the keys at these positions."""
        return self.k[:, :, self.summaries + first : self.summaries + last]
