"""``dynmask bench decode``: one query row, from a bounded cache and from an unbounded one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dynmask.bench import dense, gate
from dynmask.bench.engine import Engine
from dynmask.bench.inputs import Inputs, Settings, make_inputs, make_score
from dynmask.bench.op import part, usable_baselines
from dynmask.bench.timing import Clock, Run, Times, graphed, measure, ratio
from dynmask.ops.bounded import STATE, BoundedKeys


def cells(settings: Settings, engine: Engine, clock: Clock, length: int) -> list[dict[str, Any]]:
    """Measure one context length, from either cache, for every kind of score.

    ``bounded``: ``batch`` rows of a cache with the ``keep`` slots that the score kept of the
    context; a step takes in the new token, which finds and overwrites the slot that it evicts, and
    attends. Its shape does not depend on the context. ``unbounded``: one row, a cache of the whole
    context, an expiry for each slot; beside it dense decode over the same cache. Selection is not
    timed there: the expiries are taken to be known.

    Runs: ``step`` as called from Python, ``graph`` the same as a CUDA graph where there are any.
    """
    return [
        *_bounded(settings, engine, clock, length),
        *_unbounded(settings, engine, clock, length),
    ]


def with_graph(
    call: Callable[[], object], clock: Clock, before: Callable[[], object] | None = None
) -> tuple[dict[str, Run], str | None]:
    """Return a call's runs, as it is and as a CUDA graph, and why there is no graph.

    Args:
        call: What is timed.
        clock: Of the device.
        before: Run before each call, untimed.
    """

    def run(timed: Callable[[], object]) -> Run:
        return Run(timed) if before is None else Run(lambda _: timed(), before)

    runs = {"step": run(call)}
    if clock.device.type != "cuda":
        return runs, "no CUDA"
    try:
        runs["graph"] = run(graphed(call))
    except Exception as error:  # a capture can fail in torch, in triton and in the driver
        return runs, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    return runs, None


def _bounded(settings: Settings, engine: Engine, clock: Clock, length: int) -> list[dict[str, Any]]:
    results = []
    keep = min(settings.keep, length - 1)
    for kind in settings.scores:
        cell: dict[str, Any] = {"length": length, "cache": "bounded", "score": kind, "status": "ok"}
        # Row by row: a batch of whole scores of a long context would fill the device.
        one = replace(settings, batch=1)
        kept, new = [], []
        for row in range(settings.batch):
            score = make_score(replace(one, seed=settings.seed + row), kind, length)
            kept.append(score[..., :-1].topk(keep).values)
            new.append(score[..., -1:])
        score = torch.cat([torch.cat(kept), torch.cat(new)], -1)
        inputs = make_inputs(settings, keep + 1, q_len=1)
        step = BoundedStep(engine, inputs, score, keep)
        moved = _bytes(inputs, keep)
        results.append(
            cell | _cell(settings, clock, inputs, step, score, {}, keep, moved, step.restore)
        )
    return results


class BoundedStep:
    """One step of decoding from a bounded cache: the last key goes in, then its row attends.

    Args:
        engine: What attends.
        inputs: The row's query, and keys and values of the context, its own the last.
        score: ``[B, G, K]``, also the bias.
        keep: Slots of the cache.
    """

    def __init__(self, engine: Engine, inputs: Inputs, score: Tensor, keep: int) -> None:
        self._engine, self._q = engine, inputs.q
        batch, groups, _, dim = inputs.k.shape
        self._keys = BoundedKeys(
            keep,
            batch=batch,
            groups=groups,
            dim=dim,
            dtype=inputs.k.dtype,
            device=inputs.k.device,
        )
        context = inputs.k[:, :, :-1], inputs.v[:, :, :-1], score[..., :-1]
        self._keys.extend(*context)
        self._new = inputs.k[:, :, -1:], inputs.v[:, :, -1:], score[..., -1:].contiguous()
        self._state = [getattr(self._keys, name) for name in STATE]
        self._saved = [tensor.clone() for tensor in self._state]

    def restore(self) -> None:
        """Take the last key out again."""
        for tensor, saved in zip(self._state, self._saved, strict=True):
            tensor.copy_(saved)

    def __call__(self) -> Tensor:
        """Take the step."""
        self._keys.insert(*self._new)
        k, v, score, mask = self._keys.view()
        return self._engine.attend(self._q, k, v, mask, score)


def _unbounded(
    settings: Settings, engine: Engine, clock: Clock, length: int
) -> list[dict[str, Any]]:
    results = []
    settings = replace(settings, batch=1)
    inputs = make_inputs(settings, length, q_len=1)
    baselines, failed = usable_baselines(inputs, dense.causal(inputs.q.device))
    for kind in settings.scores:
        cell: dict[str, Any] = {
            "length": length,
            "cache": "unbounded",
            "score": kind,
            "status": "ok",
            "dense_failed": failed,
        }
        results.append(cell)
        score = make_score(settings, kind, length)
        mask = engine.select(score, settings.keep, length - 1)
        try:
            gate.check_selection(mask, score, settings.keep, [length - 1])
        except gate.GateError as error:
            cell |= {"status": "error", "error": str(error)}
            continue
        step = partial(engine.attend, *inputs, mask, score)
        moved = _bytes(inputs, min(settings.keep, length))
        cell |= _cell(settings, clock, inputs, step, score, baselines, settings.keep, moved)
    return results


def _cell(
    settings: Settings,
    clock: Clock,
    inputs: Inputs,
    step: Callable[[], Tensor],
    score: Tensor,
    baselines: dict[str, Run],
    keep: int,
    moved: int,
    before: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Gate and time one step; ``moved`` are the bytes of the visible keys and values."""
    last = inputs.k.shape[2] - 1
    try:
        checked = gate.check_rows(step(), inputs, score, score, keep, [last])
    except gate.GateError as error:
        return {"status": "error", "error": str(error)}
    ours, no_graph = with_graph(step, clock, before)
    runs = {f"ours {name}": run for name, run in ours.items()}
    for name, run in baselines.items():
        both, _ = with_graph(run.call, clock)
        runs |= {f"dense {name} {way}": one for way, one in both.items()}
    times = measure(
        runs, clock, rounds=settings.rounds, warmups=settings.warmups, budget=settings.budget
    )
    return {"gate": checked, "no_graph": no_graph} | _summary(
        part(times, "ours"), part(times, "dense"), moved
    )


def _bytes(inputs: Inputs, keep: int) -> int:
    batch, groups, _, dim = inputs.k.shape
    return 2 * batch * groups * keep * dim * inputs.k.element_size()


def _summary(times: dict[str, Times], dense_times: dict[str, Times], moved: int) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "times": {name: time.to_dict() for name, time in times.items()},
        "bytes": moved,
        "bytes_per_second": moved / min(time.median for time in times.values()),
    }
    if dense_times:
        best = dense.fastest(dense_times)
        summary["dense"] = {
            "times": {name: time.to_dict() for name, time in dense_times.items()},
            "fastest": best,
        }
        summary["ratio"] = ratio(dense_times[best], times[dense.fastest(times)])
    return summary
