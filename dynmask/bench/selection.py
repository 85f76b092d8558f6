"""``dynmask bench select``: the exact causal top-w alone."""

from __future__ import annotations

from functools import partial
from typing import Any

from dynmask.bench import gate
from dynmask.bench.engine import Engine, unused, visible_pairs
from dynmask.bench.inputs import Settings, make_score
from dynmask.bench.op import causal_pairs
from dynmask.bench.timing import Clock, Run, measure, peak_memory


def cells(settings: Settings, engine: Engine, clock: Clock, length: int) -> list[dict[str, Any]]:
    """Measure one length: time, keys per second and peak memory for every kind of score.

    Also the peak memory of the schedule that attention makes of the mask, where the backend has
    such a step.
    """
    results = []
    for kind in settings.scores:
        score = make_score(settings, kind, length)
        cell: dict[str, Any] = {"length": length, "score": kind, "status": "ok"}
        results.append(cell)
        try:
            mask = engine.select(score, settings.keep)
            rows = gate.sample_rows(length, keep=settings.keep)
            gate.check_selection(mask, score, settings.keep, rows)
        except gate.GateError as error:
            cell |= {"status": "error", "error": str(error)}
            continue
        pairs = visible_pairs(mask, settings.heads)
        select = partial(engine.select, score, settings.keep)
        times = measure(
            {"selection": Run(select)},
            clock,
            rounds=settings.rounds,
            warmups=settings.warmups,
            budget=settings.budget,
        )
        clock.release()
        cell |= {
            "density": pairs / causal_pairs(settings, length),
            "times": {name: time.to_dict() for name, time in times.items()},
            "keys_per_second": score.numel() / times["selection"].median,
            "score_bytes": score.numel() * score.element_size(),
            "peak_bytes": peak_memory(select, clock.device),
            "schedule_bytes": None
            if engine.prepare is None
            else peak_memory(partial(engine.prepare, unused(mask), length, length), clock.device),
        }
    return results
