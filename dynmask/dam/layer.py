"""What a plan holds of one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

#: Largest side of a preview picture, in pixels.
PREVIEW_SIZE = 128


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One layer's stripes and what they were measured to keep; all tensors on the CPU.

    Attributes:
        columns: H sorted unique int64 tensors in `[0, L)`.
        offsets: H sorted unique int64 tensors in `[0, L)`, each with 0, the own token.
        corner: `[H, L, L]` bool, causal: the true mask of the captured corner.
        coverage: `[H]` float32, `Coverage.mean`: share of attention that columns and offsets keep
            in rows beyond the corner; the gate compares it with the target.
        tail_coverage: `[H]` float32, `Coverage.tail`: the same over the worst tenth of these rows.
        corner_coverage: `[H]` float32, `Coverage.corner_mean`: share kept in the corner's rows.
        gate: `[H]` bool, True where mode "auto" runs the head dense.
        previews: `[2, H, P, P]` float16, `P = min(L, 128)`: the mean map before and after
            amplification, as `preview` makes them.

    Raises:
        ValueError: A tensor breaks the above; the message names it.
    """

    columns: tuple[Tensor, ...]
    offsets: tuple[Tensor, ...]
    corner: Tensor
    coverage: Tensor
    tail_coverage: Tensor
    corner_coverage: Tensor
    gate: Tensor
    previews: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "offsets", tuple(self.offsets))
        heads, length = self.heads, self.capture_length
        if heads < 1 or len(self.offsets) != heads:
            raise ValueError(f"columns has {heads} heads, offsets {len(self.offsets)}")
        for head in range(heads):
            _check_positions(f"columns[{head}]", self.columns[head], length)
            _check_positions(f"offsets[{head}]", self.offsets[head], length)
            if len(self.offsets[head]) == 0 or self.offsets[head][0] != 0:
                raise ValueError(f"offsets[{head}] must hold 0, the own token")
        _check_tensor("corner", self.corner, (heads, length, length), torch.bool)
        if torch.triu(self.corner, 1).any():
            raise ValueError("corner must be causal: no pair above the diagonal")
        if not self.corner.diagonal(dim1=-2, dim2=-1).all():
            raise ValueError("corner must hold every own token")
        for name in ("coverage", "tail_coverage", "corner_coverage"):
            value = getattr(self, name)
            _check_tensor(name, value, (heads,), torch.float32)
            if not ((value >= 0) & (value <= 1)).all():
                raise ValueError(f"{name} must be from 0 to 1, got {value.tolist()}")
        _check_tensor("gate", self.gate, (heads,), torch.bool)
        side = min(length, PREVIEW_SIZE)
        _check_tensor("previews", self.previews, (2, heads, side, side), torch.float16)
        if not self.previews.isfinite().all():
            raise ValueError("previews must be finite")

    @property
    def heads(self) -> int:
        """H, the number of query heads."""
        return len(self.columns)

    @property
    def capture_length(self) -> int:
        """L, the side of the captured corner."""
        return int(self.corner.shape[-1])


def preview(mean: Tensor, amplified: Tensor) -> Tensor:
    """Shrink a layer's maps to pictures.

    Each pixel is the maximum of its cell: a mean would wash out a line of one token.

    Args:
        mean: `[H, L, L]` mean map.
        amplified: `[H, L, L]` the same map amplified.

    Returns:
        `[2, H, P, P]` float16 on the CPU, `P = min(L, 128)`, clamped to float16's range.
    """
    maps = torch.stack([mean, amplified]).float()
    if maps.shape[-1] > PREVIEW_SIZE:
        maps = functional.adaptive_max_pool2d(maps, PREVIEW_SIZE)
    largest = torch.finfo(torch.float16).max
    return maps.clamp(-largest, largest).to(torch.float16).cpu()


def _check_tensor(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(value.shape) != shape or value.dtype != dtype or value.device.type != "cpu":
        raise ValueError(
            f"{name} must be {list(shape)} {dtype} on the CPU, got {list(value.shape)}"
            f" {value.dtype} on {value.device}"
        )


def _check_positions(name: str, value: Tensor, length: int) -> None:
    _check_tensor(name, value, (value.numel(),), torch.int64)
    if len(value) == 0:
        return
    if (value.diff() <= 0).any():
        raise ValueError(f"{name} must be sorted and unique")
    if value[0] < 0 or value[-1] >= length:
        raise ValueError(f"{name} must lie in [0, {length})")
