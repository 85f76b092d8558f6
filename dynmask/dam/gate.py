"""Decide which heads a plan runs dense."""

from __future__ import annotations

from torch import Tensor


def gate_heads(coverage: Tensor, target: float) -> Tensor:
    """Return True for the heads that must run dense: coverage below the target.

    Args:
        coverage: `[H]` share of attention that the stripes keep beyond the captured corner
            (`Coverage.mean`), in [0, 1].
        target: Share wanted, in (0, 1].

    Returns:
        `[H]` bool.

    Raises:
        ValueError: The target is out of range.
    """
    if not 0 < target <= 1:
        raise ValueError(f"coverage={target} must be above 0 and at most 1")
    return coverage < target
