"""Count what an accelerated model really did."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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


class Clock:
    """Adds the time spent inside the block to a tally: the device's own on a GPU, without waiting.

    Args:
        tally: Takes the time.
        device: Where the work is done.
    """

    def __init__(self, tally: Tally, device: torch.device):
        self._tally = tally
        self._device = device

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            self._begin = self._mark()
        else:
            self._started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            self._tally.add_events(self._begin, self._mark())
        else:
            self._tally.add_seconds(time.perf_counter() - self._started)

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class Tally:
    """Counts of attention calls by kind and implementation; calls may come from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: Counter[tuple[str, str]] = Counter()
        self._shapes: Counter[tuple[str, str, int, Sequences]] = Counter()
        self._pairs: dict[str, list[int | Tensor]] = {}
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0
        self._said: set[str] = set()

    def first_time(self, message: str) -> bool:
        """Say whether a message was not asked about before."""
        with self._lock:
            new = message not in self._said
            self._said.add(message)
        return new

    @property
    def mask_seconds(self) -> float:
        """Time spent on masks and schedules so far; waits for a GPU that still works on them."""
        with self._lock:
            for begin, end in self._events:
                end.synchronize()
                self._seconds += begin.elapsed_time(end) / 1000
            self._events.clear()
            return self._seconds

    def add_seconds(self, seconds: float) -> None:
        """Add time spent on masks and schedules."""
        with self._lock:
            self._seconds += seconds

    def clock(self, device: torch.device) -> Clock:
        """Return a context that adds the time spent inside; it may be entered many times."""
        return Clock(self, device)

    def add_events(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """Add the device time between two recorded events, read when the statistics are."""
        with self._lock:
            self._events.append((begin, end))

    def add_pairs(
        self, kind: str, *, causal: int, shown: int | Tensor, computed: int | Tensor
    ) -> None:
        """Add what one call showed and evaluated, where it is not told by a shape and stripes.

        Args:
            kind: One of ``KINDS``.
            causal: Causal pairs of all heads.
            shown: Those that the masks show; a tensor is read when the statistics are.
            computed: Those that were evaluated.
        """
        with self._lock:
            before = self._pairs.get(kind, [0, 0, 0])
            new = (causal, shown, computed)
            self._pairs[kind] = [a + b for a, b in zip(before, new, strict=True)]

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

    def add_stripes(self, kind: str, impl: str, mask: Stripes, sequences: Sequences) -> None:
        """Add what some heads showed and evaluated under stripes; see `add_pairs`.

        Args:
            kind: One of ``KINDS``.
            impl: What ran them.
            mask: Their stripes, without padding, best on the CPU: they are counted here.
            sequences: What was computed.
        """
        for first, length in sequences:
            causal, shown, computed = _pairs(mask, impl, first, length)
            self.add_pairs(kind, causal=causal, shown=shown, computed=computed)

    def summary(self, masks: Mapping[int, Stripes]) -> dict[str, Any]:
        """Return calls, implementations and densities by kind, as plain values.

        Args:
            masks: Every counted layer's stripes, without padding.
        """
        with self._lock:
            calls, shapes = self._calls.copy(), self._shapes.copy()
            measured = {kind: [int(n) for n in pairs] for kind, pairs in self._pairs.items()}
        summary: dict[str, Any] = {"calls": {}, "impl": {}, "density": {}, "computed_density": {}}
        for kind in KINDS:
            by_impl = {impl: n for (k, impl), n in sorted(calls.items()) if k == kind}
            if by_impl:
                summary["calls"][kind] = sum(by_impl.values())
                summary["impl"][kind] = by_impl
            causal, requested, computed = measured.get(kind, [0, 0, 0])
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
