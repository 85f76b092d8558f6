"""The processes of `parallel.py`: what they run alone and together, and how long it takes."""

from __future__ import annotations

import datetime
import gc
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from dynmask.bench.timing import Times

T = TypeVar("T")
# A process that fails between two exchanges leaves the others waiting for it.
_PATIENCE = datetime.timedelta(minutes=5)


class Group:
    """The processes, and how they wait for each other without keeping a GPU busy."""

    def __init__(self, kind: str):
        place = int(os.environ["LOCAL_RANK"])
        self.device = torch.device(kind, place) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=_PATIENCE)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._host = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=10))

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(group=self._host)

    def run(self, call: Callable[[], T], *, alone: bool = False) -> T | None:
        """Return what a call gives; with ``alone`` the first process only runs it, others get None.

        Raises:
            RuntimeError: In all processes, if it failed in one of them.
        """
        self.wait()
        found, failure = None, None
        try:
            if not alone or self.rank == 0:
                found = call()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"[:500]
        failures: list[str | None] = [None] * self.size
        dist.all_gather_object(failures, failure, group=self._host)
        if told := [f"process {i}: {text}" for i, text in enumerate(failures) if text]:
            raise RuntimeError("; ".join(told))
        return found

    def times(self, call: Callable[[], Any], rounds: int, *, alone: bool) -> Times:
        """Time the slowest process; with ``alone`` the first one only runs, the others wait."""
        found = []
        for _ in range(rounds + 2):  # The first two compile.
            own = self.run(partial(self._seconds, call), alone=alone)
            took = torch.tensor(0.0 if own is None else own)
            dist.all_reduce(took, dist.ReduceOp.MAX, group=self._host)
            found.append(float(took))
        return Times.of(found[2:])

    def _seconds(self, call: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def from_first(self, value: T) -> T:
        """Return the first process's number or text in all."""
        told = [value]
        dist.broadcast_object_list(told, 0, group=self._host)
        return told[0]

    def free(self) -> None:
        gc.collect()
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def efficiency(alone: Times, together: Times, share: int) -> dict[str, Any]:
    """Return both times, and ``alone / (share together)`` with what the quartiles allow."""
    return {
        "alone": alone.to_dict(),
        "together": together.to_dict(),
        "efficiency": {
            "low": alone.low / together.high / share,
            "median": alone.median / together.median / share,
            "high": alone.high / together.low / share,
        },
    }
