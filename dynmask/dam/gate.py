"""Decide which heads a plan runs dense."""

from __future__ import annotations

from torch import Tensor


def gate_heads(tail_coverage: Tensor, target: float) -> Tensor:
    """Return True for the heads that must run dense: tail coverage below the target.

    Args:
        tail_coverage: `[H]` share of attention that the stripes keep in the worst rows
            (`Coverage.tail`), in [0, 1].
        target: Share wanted, in (0, 1].

    Returns:
        `[H]` bool.

    Raises:
        ValueError: The target is out of range.
    """
    if not 0 < target <= 1:
        raise ValueError(f"coverage={target} must be above 0 and at most 1")
    return tail_coverage < target
