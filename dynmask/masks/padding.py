"""Which key slots of a padded batch hold real tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dynmask.masks.checks import require_tensor


@dataclass(frozen=True, eq=False)
class Padding:
    """Real tokens of batch row ``b`` are the key slots ``start[b] <= j < stop[b]``.

    One run per row says left padding (``start > 0``), right padding (``stop < K``) or both. A row
    with ``start == stop`` has no tokens at all.

    Args:
        start: ``[B]`` int64, first real key slot.
        stop: ``[B]`` int64, one past the last real key slot.

    Raises:
        ValueError: If shapes or dtypes differ from the above, or not ``0 <= start <= stop``.
    """

    start: Tensor
    stop: Tensor

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("stop", self.stop)):
            require_tensor(name, value)
            if value.dim() != 1 or value.dtype != torch.int64:
                raise ValueError(
                    f"{name} must be a [B] int64 tensor, got {list(value.shape)} {value.dtype}: "
                    "pass torch.tensor([...]), or build it with Padding.from_mask(attention_mask)"
                )
        if self.start.shape != self.stop.shape:
            raise ValueError(
                f"start and stop must have the same length, got {len(self.start)} and "
                f"{len(self.stop)}: give one pair per batch row"
            )
        if bool(((self.start < 0) | (self.start > self.stop)).any()):
            raise ValueError("start and stop must satisfy 0 <= start <= stop in every batch row")

    @classmethod
    def from_mask(cls, attention_mask: Tensor) -> Padding:
        """Read the runs of a 0/1 mask as tokenizers return it.

        Args:
            attention_mask: ``[B, K]``, 1 (or True) where the slot holds a real token.

        Returns:
            The padding; a row of zeros becomes an empty run.

        Raises:
            ValueError: If the mask is not ``[B, K]``, holds other values than 0 and 1, or the ones
                of a row are not one run.
        """
        require_tensor("attention_mask", attention_mask)
        if attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask must be [B, K], got {list(attention_mask.shape)}: pass the "
                "tokenizer's mask, not an expanded 4-d one"
            )
        real = attention_mask != 0
        if attention_mask.dtype != torch.bool and bool((real & (attention_mask != 1)).any()):
            raise ValueError("attention_mask must hold only 0 and 1 (additive masks are not read)")
        length = real.sum(1)
        if real.shape[1] == 0:
            return cls(length, length.clone())
        start = real.int().argmax(1)
        stop = start + length
        slot = torch.arange(real.shape[1], device=real.device)
        run = (slot >= start[:, None]) & (slot < stop[:, None])
        broken = (run != real).any(1).nonzero().flatten().tolist()
        if broken:
            raise ValueError(
                f"attention_mask rows {broken} have real tokens in several runs: move each row's "
                "tokens together (left or right padding)"
            )
        return cls(start, stop)

    def dense(self, k_len: int) -> Tensor:
        """Return ``[B, K]`` bool, True where the slot holds a real token."""
        slot = torch.arange(k_len, device=self.start.device)
        return (slot >= self.start[:, None]) & (slot < self.stop[:, None])

    def runs(self, k_len: int) -> list[tuple[int, int]]:
        """Return ``(start, stop)`` of every batch row, cut to ``k_len`` slots."""
        return [(min(a, k_len), min(b, k_len)) for a, b in self._runs]

    @property
    def end(self) -> int:
        """One past the last real key slot of any row; 0 if there is none."""
        return max((stop for _, stop in self._runs), default=0)

    @cached_property
    def _runs(self) -> list[tuple[int, int]]:
        # Read once: on a GPU each reading waits for the device, and every layer asks.
        return list(zip(self.start.tolist(), self.stop.tolist(), strict=True))

    def to(self, device: torch.device | str) -> Padding:
        """Return the same padding on ``device``."""
        _ = self._runs  # The copy takes over what is read here without waiting for the device.
        moved = object.__new__(Padding)
        moved.__dict__.update(vars(self), start=self.start.to(device), stop=self.stop.to(device))
        return moved
