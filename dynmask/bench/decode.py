"""``dynmask bench decode``: one query row, from a bounded cache and from an unbounded one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dynmask.bench import dense, gate
from dynmask.bench.engine import Engine
from dynmask.bench.inputs import Inputs, Settings, make_inputs, make_score
from dynmask.bench.op import part, usable_baselines
from dynmask.bench.timing import Clock, Run, Times, graphed, measure, ratio
from dynmask.masks import Lifetimes
from dynmask.masks.lifetimes import NEVER


def cells(settings: Settings, engine: Engine, clock: Clock, length: int) -> list[dict[str, Any]]:
    """Measure one context length, from either cache, for every kind of score.

    ``bounded``: ``batch`` rows of a cache with the ``keep`` slots that the score kept of the
    context, all visible. Its shape does not depend on the context. ``unbounded``: one row, a cache
    of the whole context, an expiry for each slot; beside it dense decode over the same cache.
    Selection is not timed: a cache keeps its lifetimes from step to step.

    Runs: ``step`` as called from Python, ``graph`` the same as a CUDA graph where there are any.
    """
    return [
        *_bounded(settings, engine, clock, length),
        *_unbounded(settings, engine, clock, length),
    ]


def with_graph(call: Callable[[], object], clock: Clock) -> tuple[dict[str, Run], str | None]:
    """Return a call's runs, as it is and as a CUDA graph, and why there is no graph."""
    runs = {"step": Run(call)}
    if clock.device.type != "cuda":
        return runs, "no CUDA"
    try:
        runs["graph"] = Run(graphed(call))
    except Exception as error:  # a capture can fail in torch, in triton and in the driver
        return runs, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    return runs, None


def _bounded(settings: Settings, engine: Engine, clock: Clock, length: int) -> list[dict[str, Any]]:
    results = []
    keep = min(settings.keep, length)
    inputs = make_inputs(settings, keep, q_len=1)
    for kind in settings.scores:
        cell: dict[str, Any] = {"length": length, "cache": "bounded", "score": kind, "status": "ok"}
        # Row by row: a batch of whole scores of a long context would fill the device.
        one = replace(settings, batch=1)
        bias = torch.cat(
            [
                make_score(replace(one, seed=settings.seed + row), kind, length).topk(keep).values
                for row in range(settings.batch)
            ]
        )
        expiry = torch.full_like(bias, NEVER, dtype=torch.int32)
        mask = Lifetimes(expiry, most=keep)
        results.append(cell | _cell(settings, engine, clock, inputs, mask, bias, {}, keep))
    return results


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
        cell |= _cell(settings, engine, clock, inputs, mask, score, baselines, settings.keep)
    return results


def _cell(
    settings: Settings,
    engine: Engine,
    clock: Clock,
    inputs: Inputs,
    mask: Lifetimes,
    bias: Tensor,
    baselines: dict[str, Run],
    keep: int,
) -> dict[str, Any]:
    """Gate and time one step; the bytes are those of the visible keys and values."""
    last = inputs.k.shape[2] - 1
    try:
        out = engine.attend(*inputs, mask, bias)
        checked = gate.check_rows(out, inputs, bias, bias, keep, [last])
    except gate.GateError as error:
        return {"status": "error", "error": str(error)}
    ours, no_graph = with_graph(lambda: engine.attend(*inputs, mask, bias), clock)
    runs = {f"ours {name}": run for name, run in ours.items()}
    for name, run in baselines.items():
        both, _ = with_graph(run.call, clock)
        runs |= {f"dense {name} {way}": one for way, one in both.items()}
    times = measure(
        runs, clock, rounds=settings.rounds, warmups=settings.warmups, budget=settings.budget
    )
    return {"gate": checked, "no_graph": no_graph} | _summary(
        part(times, "ours"), part(times, "dense"), _bytes(inputs, min(keep, last + 1))
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
