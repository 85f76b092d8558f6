"""What the selection's kernels hand on."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Lists(NamedTuple):
    """Lists in order of slots. A key is an integer that ranks like segment and score.

    Attributes:
        key: ``[L, N]`` int32, or int64 if there are segments; above the type's minimum.
        slot: ``[L, N]`` int32.
    """

    key: Tensor
    slot: Tensor

    @classmethod
    def empty(cls, lists: int, entries: int, *, like: Tensor) -> Lists:
        """Make room. Kernels load 16 entries at a time, so a list has a multiple of that."""
        key = like.new_empty(lists, triton.cdiv(entries, 16) * 16)
        return cls(key, torch.empty_like(key, dtype=torch.int32))

    @property
    def strides(self) -> tuple[int, int]:
        """From one list to the next."""
        return self.key.stride(0), self.slot.stride(0)
