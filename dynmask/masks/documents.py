"""Which packed document each key slot belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmask.masks.checks import require_tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """Slots of equal ``ids`` are one document; a row sees its own document only.

    Alone, as a mask: ``Lifetimes(documents.ends()[:, None])``. With another mask:
    ``lifetimes & documents``.

    Args:
        ids: ``[B, K]`` integers, never falling along K; ``B`` may be 1 for a whole batch.

    Raises:
        ValueError: If ``ids`` is not ``[B, K]`` integer, or falls somewhere.
    """

    ids: Tensor

    def __post_init__(self) -> None:
        ids = self.ids
        require_tensor("ids", ids)
        if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"ids must be [B, K] integer, got {list(ids.shape)} {ids.dtype}")
        if not torch.compiler.is_compiling() and bool((ids[:, 1:] < ids[:, :-1]).any()):
            raise ValueError(
                "ids fall along K: number the documents of a row in the order of their slots"
            )

    @property
    def device(self) -> torch.device:
        """Where the ids live."""
        return self.ids.device

    def ordinals(self) -> Tensor:
        """Return ``[B, K]`` int32, the documents of each row numbered 0, 1, 2, ..."""
        changed = torch.zeros_like(self.ids, dtype=torch.int32)
        changed[:, 1:] = self.ids[:, 1:] != self.ids[:, :-1]
        return changed.cumsum(-1, dtype=torch.int32)

    def ends(self) -> Tensor:
        """Return ``[B, K]`` int32, one past the last slot of each slot's document."""
        ids = self.ids.contiguous()
        return torch.searchsorted(ids, ids, right=True, out_int32=True)

    def to(self, device: torch.device | str) -> Documents:
        """Return the same documents on ``device``."""
        if torch.device(device) == self.device:
            return self
        # Checked when it was made, and on a GPU the check would wait for the device.
        moved = object.__new__(Documents)
        moved.__dict__.update(ids=self.ids.to(device))
        return moved
