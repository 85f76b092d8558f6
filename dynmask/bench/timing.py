"""How long something takes: device events, a cold cache, and rounds in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

_FLUSH_BYTES = 256 << 20
"""Several times the L2 cache of any GPU of today (H100 and H200: 50 MiB)."""
_FLUSHES = 24
"""Some 2 ms on a GPU of today: a head start for the host."""
_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Run:
    """Something to time.

    Args:
        call: What is timed; it gets what ``fresh`` returned, or nothing.
        fresh: Makes the argument of ``call`` anew before each call, untimed.
    """

    call: Callable[..., object]
    fresh: Callable[[], object] | None = None

    def __call__(self) -> object:
        """Call once, with a fresh argument."""
        return self.call() if self.fresh is None else self.call(self.fresh())


@dataclass(frozen=True)
class Times:
    """Median and quartiles over rounds, in seconds.

    Args:
        median: The figure.
        low: First quartile.
        high: Third quartile.
        rounds: How many were timed.
    """

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        """Summarise one run's rounds; at least one."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)


class Clock:
    """Times single calls on one device.

    On CUDA: events around the call, after a buffer several times the L2 cache was written, so that
    no call finds its inputs in the cache. It is written often enough that the launches of a call
    are queued meanwhile, as they are inside a model's prefill: what counts is the device's time,
    gaps between kernels included, for the baselines as for ours. On the CPU: ``perf_counter``, with
    no attempt at a cold cache.

    Args:
        device: ``cuda`` or ``cpu``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffer: torch.Tensor | None = None

    def seconds(self, run: Run) -> float:
        """Time one call."""
        arguments = () if run.fresh is None else (run.fresh(),)
        if self.device.type != "cuda":
            begin = time.perf_counter()
            run.call(*arguments)
            return time.perf_counter() - begin
        if self._buffer is None:
            self._buffer = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(_FLUSHES):
            self._buffer.zero_()
        start.record()
        run.call(*arguments)
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def release(self) -> None:
        """Give the buffer back, before memory is measured."""
        self._buffer = None


def measure(
    runs: Mapping[str, Run], clock: Clock, *, rounds: int, warmups: int, budget: float
) -> dict[str, Times]:
    """Time several runs in turn, so that all of them see the same machine.

    Round by round every run is called once, in order. A run whose rounds would cost more than
    ``budget`` seconds gets fewer, at least 3, spread evenly over the rounds of the others, and
    fewer warm-ups, at least one.

    Args:
        runs: Name to run.
        clock: Times a call.
        rounds: Timed calls of each run.
        warmups: Untimed calls of each run before the first round.
        budget: Seconds that the rounds of one run may cost.
    """
    counts = {}
    for name, run in runs.items():
        took = clock.seconds(run)
        if took < budget and warmups > 1:  # the first call may have compiled
            took = clock.seconds(run)
        for _ in range(min(warmups - 2, int(budget / took))):
            clock.seconds(run)
        counts[name] = min(rounds, max(_LEAST_ROUNDS, math.ceil(budget / took)))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name, run in runs.items():
            # Turn * count // rounds steps up exactly `count` times in all.
            if turn * counts[name] // rounds < (turn + 1) * counts[name] // rounds:
                seconds[name].append(clock.seconds(run))
    return {name: Times.of(values) for name, values in seconds.items()}


def ratio(numerator: Times, denominator: Times) -> dict[str, float]:
    """Return the ratio of two medians with the widest range that the quartiles allow."""
    return {
        "median": numerator.median / denominator.median,
        "low": numerator.low / denominator.high,
        "high": numerator.high / denominator.low,
    }


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """Capture a call as a CUDA graph and return what replays it.

    Raises:
        RuntimeError: If the call cannot be captured, for example since it waits for the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the most bytes that a call holds beyond what was allocated before; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak
