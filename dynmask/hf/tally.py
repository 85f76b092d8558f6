"""Count what an accelerated model really did."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dynmask.masks import Stripes
from dynmask.ops import computed_pairs

KINDS = ("prefill", "chunk", "decode")

Sequences = tuple[tuple[int, int], ...]
"""Per batch row ``(first, length)``: a sequence's rows ``first`` to ``length - 1`` were queries."""


def kind_of(q_len: int, k_len: int) -> str:
    """Name a call: "prefill" (no cache), "decode" (one row), or "chunk" (rows behind a cache)."""
    if q_len == k_len:
        return "prefill"
    return "decode" if q_len == 1 else "chunk"


class Tally:
    """Counts of attention calls by kind and implementation; calls may come from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: Counter[tuple[str, str]] = Counter()
        self._shapes: Counter[tuple[str, str, int, Sequences]] = Counter()
        self.mask_seconds = 0.0

    def add_seconds(self, seconds: float) -> None:
        """Add time spent on masks and schedules."""
        with self._lock:
            self.mask_seconds += seconds

    def add(self, kind: str, impl: str, layer: int, sequences: Sequences = ()) -> None:
        """Count one attention call.

        Args:
            kind: One of ``KINDS``.
            impl: What ran it.
            layer: The layer's index.
            sequences: What was computed, for the densities; empty to leave the call out of them.
        """
        with self._lock:
            self._calls[kind, impl] += 1
            if sequences:
                self._shapes[kind, impl, layer, sequences] += 1

    def summary(self, masks: Mapping[int, Stripes]) -> dict[str, Any]:
        """Return calls, implementations and densities by kind, as plain values.

        Args:
            masks: Every counted layer's stripes, without padding.
        """
        with self._lock:
            calls, shapes = self._calls.copy(), self._shapes.copy()
        summary: dict[str, Any] = {"calls": {}, "impl": {}, "density": {}, "computed_density": {}}
        for kind in KINDS:
            by_impl = {impl: n for (k, impl), n in sorted(calls.items()) if k == kind}
            if by_impl:
                summary["calls"][kind] = sum(by_impl.values())
                summary["impl"][kind] = by_impl
            causal = requested = computed = 0
            for (k, impl, layer, sequences), times in shapes.items():
                if k == kind:
                    for first, length in sequences:
                        pairs = _pairs(masks[layer], impl, first, length)
                        causal += times * pairs[0]
                        requested += times * pairs[1]
                        computed += times * pairs[2]
            if causal:
                summary["density"][kind] = requested / causal
                summary["computed_density"][kind] = computed / causal
        return summary


def _pairs(mask: Stripes, impl: str, first: int, length: int) -> tuple[int, int, int]:
    """Count (query, key) pairs of all heads: causal, shown by the mask, and evaluated."""
    causal = (length * (length + 1) - first * (first + 1)) // 2
    requested = int(mask.visible_pairs(length - first, length).sum())
    if impl != "cpu":
        return mask.heads * causal, requested, mask.heads * causal
    return mask.heads * causal, requested, int(computed_pairs(mask, length - first, length).sum())
