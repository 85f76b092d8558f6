"""Count what an accelerated model really did."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from typing import Any

import torch
from torch import Tensor

from dynmask.masks import Stripes
from dynmask.ops import computed_pairs

KINDS = ("prefill", "chunk", "decode")

# What waits to be added up, at most. A run that serves for weeks must not grow.
_MOST_SHAPES = 512
_MOST_EVENTS = 64
_MOST_UNFINISHED = 1024
# A device adds in int64; read before a sum could come near its end.
_MOST_PAIRS = 2**60

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


class DeviceSum:
    """A sum of counts on one stream of a device, added up there without waiting for it."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        # Made in inference mode, it could not be added to outside of it.
        with torch.inference_mode(False):
            self._sum = torch.zeros((), dtype=torch.int64, device=device)
        self._most = 0

    def add(self, count: Tensor, most: int) -> int:
        """Add a count of at most ``most``; return what had to be taken out to make room."""
        taken = self.take() if self._most + most > _MOST_PAIRS else 0
        self._most += most
        self._sum += count
        return taken

    def take(self) -> int:
        """Return the sum so far and go on from 0; waits for the stream."""
        if self._stream is not None:
            self._stream.synchronize()
        taken = int(self._sum)
        self._sum.zero_()
        if self._stream is not None:
            # This may be another thread, whose stream is not the one that adds.
            torch.cuda.current_stream(self._sum.device).synchronize()
        self._most = 0
        return taken


class Tally:
    """Counts of attention calls by kind and implementation; calls may come from several threads.

    Its memory does not grow with the number of calls, whatever their lengths: what is kept for
    later is added up once there is more than a fixed amount of it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: Counter[tuple[str, str]] = Counter()
        # The calls under stripes that are not yet counted, the last used ones last.
        self._shapes: dict[tuple[str, str, int, int, int], int] = {}
        self._stripes: dict[int, Stripes] = {}
        self._pairs = {kind: [0, 0, 0] for kind in KINDS}
        self._sums: dict[tuple[str, int, torch.device, int], DeviceSum] = {}
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
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
            while self._events:
                self._add_oldest()
            return self._seconds

    def add_seconds(self, seconds: float) -> None:
        """Add time spent on masks and schedules."""
        with self._lock:
            self._seconds += seconds

    def clock(self, device: torch.device) -> Clock:
        """Return a context that adds the time spent inside; it may be entered many times."""
        return Clock(self, device)

    def add_events(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """Add the device time between two recorded events, read once they have happened."""
        with self._lock:
            self._events.append((begin, end))
            while len(self._events) > _MOST_EVENTS and (
                self._events[0][1].query() or len(self._events) > _MOST_UNFINISHED
            ):
                self._add_oldest()

    def _add_oldest(self) -> None:
        begin, end = self._events[0]
        end.synchronize()
        self._seconds += begin.elapsed_time(end) / 1000
        # Only now: whoever is interrupted while waiting has lost nothing.
        self._events.popleft()

    def add_pairs(
        self, kind: str, *, causal: int, shown: int | Tensor, computed: int | Tensor
    ) -> None:
        """Add what one call showed and evaluated, where it is not told by a shape and stripes.

        Args:
            kind: One of ``KINDS``.
            causal: Causal pairs of all heads.
            shown: Those that the masks show; a tensor on a GPU is added there and read when the
                statistics are.
            computed: Those that were evaluated.
        """
        with self._lock:
            totals = self._pairs[kind]
            for place, count in enumerate((causal, shown, computed)):
                if isinstance(count, Tensor) and count.device.type != "cpu":
                    totals[place] += self._sum_of(kind, place, count.device).add(count, causal)
                else:
                    totals[place] += int(count)

    def _sum_of(self, kind: str, place: int, device: torch.device) -> DeviceSum:
        """Return the sum of the stream at work: adding on two at once could lose a count."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = kind, place, device, stream
        if key not in self._sums:
            self._sums[key] = DeviceSum(device)
        return self._sums[key]

    def add(self, kind: str, impl: str) -> None:
        """Count one attention call.

        Args:
            kind: One of ``KINDS``.
            impl: What ran it.
        """
        with self._lock:
            self._calls[kind, impl] += 1

    def add_dense(self, kind: str, heads: int, sequences: Sequences) -> None:
        """Add what heads showed and evaluated that see every key before them.

        Args:
            kind: One of ``KINDS``.
            heads: How many.
            sequences: What was computed.
        """
        pairs = heads * sum(_causal(first, length) for first, length in sequences)
        self.add_pairs(kind, causal=pairs, shown=pairs, computed=pairs)

    def add_layer(
        self, kind: str, impl: str, layer: int, stripes: Stripes, sequences: Sequences
    ) -> None:
        """Add what a layer under its stripes showed and evaluated, counted when it is asked for.

        Args:
            kind: One of ``KINDS``.
            impl: What ran it.
            layer: The layer's index.
            stripes: Of all its heads, without padding, on the CPU; always the same for a layer.
            sequences: What was computed.
        """
        with self._lock:
            self._stripes[layer] = stripes
            for first, length in sequences:
                shape = kind, impl, layer, first, length
                self._shapes[shape] = self._shapes.pop(shape, 0) + 1
            while len(self._shapes) > _MOST_SHAPES:
                # The longest unused: lengths that come again and again are counted once.
                self._count(next(iter(self._shapes)))

    def _count(self, shape: tuple[str, str, int, int, int]) -> None:
        kind, impl, layer, first, length = shape
        found = _pairs(self._stripes[layer], impl, first, length)
        times = self._shapes.pop(shape)
        self._pairs[kind] = [a + times * b for a, b in zip(self._pairs[kind], found, strict=True)]

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

    def summary(self) -> dict[str, Any]:
        """Return calls, implementations and densities by kind, as plain values."""
        with self._lock:
            for shape in list(self._shapes):
                self._count(shape)
            for (kind, place, *_), total in self._sums.items():
                self._pairs[kind][place] += total.take()
            calls, pairs = self._calls.copy(), {k: list(n) for k, n in self._pairs.items()}
        summary: dict[str, Any] = {"calls": {}, "impl": {}, "density": {}, "computed_density": {}}
        for kind in KINDS:
            by_impl = {impl: n for (k, impl), n in sorted(calls.items()) if k == kind}
            if by_impl:
                summary["calls"][kind] = sum(by_impl.values())
                summary["impl"][kind] = by_impl
            causal, shown, computed = pairs[kind]
            if causal:
                summary["density"][kind] = shown / causal
                summary["computed_density"][kind] = computed / causal
        return summary


def _pairs(mask: Stripes, impl: str, first: int, length: int) -> tuple[int, int, int]:
    """Count (query, key) pairs of all heads: causal, shown by the mask, and evaluated."""
    causal = mask.heads * _causal(first, length)
    shown = int(mask.visible_pairs(length - first, length).sum())
    if impl != "cpu":
        return causal, shown, causal
    return causal, shown, int(computed_pairs(mask, length - first, length).sum())


def _causal(first: int, length: int) -> int:
    """Count the causal pairs of one head."""
    return (length * (length + 1) - first * (first + 1)) // 2
