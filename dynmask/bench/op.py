"""``dynmask bench op``: the forward pass, all steps of it, against dense causal kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dynmask.bench import dense, gate
from dynmask.bench.engine import Engine, unused, visible_pairs
from dynmask.bench.inputs import Inputs, Settings, make_inputs, make_score
from dynmask.bench.timing import Clock, Run, Times, measure, ratio
from dynmask.masks import Lifetimes


def cells(settings: Settings, engine: Engine, clock: Clock, length: int) -> list[dict[str, Any]]:
    """Measure one length: the dense kernels once, the sparse steps for every kind of score.

    Runs of a cell: ``total`` is everything on a fresh mask, from the score to the output;
    ``selection``, ``schedule`` and ``attention`` are its steps alone, the last with its schedule
    made already. A backend with no step of its own to make a schedule has ``first``, attention with
    no schedule yet, and of ``schedule`` the difference of medians to ``attention``.

    Returns:
        One cell for each kind of score; of a failed gate an error and no times.
    """
    inputs = make_inputs(settings, length)
    baselines, failed = usable_baselines(inputs, dense.causal(inputs.q.device))
    runs = {f"dense {name}": run for name, run in baselines.items()}
    results: list[dict[str, Any]] = []
    for kind in settings.scores:
        score = make_score(settings, kind, length)
        cell: dict[str, Any] = {"length": length, "score": kind, "status": "ok"}
        results.append(cell)
        try:
            mask = engine.select(score, settings.keep)
            rows = gate.sample_rows(length, keep=settings.keep)
            gate.check_selection(mask, score, settings.keep, rows)
            out = engine.attend(*inputs, mask, score)
            cell["gate"] = gate.check_rows(out, inputs, score, score, settings.keep, rows)
            del out
        except gate.GateError as error:
            cell |= {"status": "error", "error": str(error)}
            continue
        pairs = visible_pairs(mask, settings.heads)
        cell["pairs"] = pairs
        cell["density"] = pairs / causal_pairs(settings, length)
        steps = _steps(engine, settings.keep, inputs, score, mask)
        runs |= {f"{kind} {name}": run for name, run in steps.items()}
    times = measure(
        runs, clock, rounds=settings.rounds, warmups=settings.warmups, budget=settings.budget
    )
    dense_times = part(times, "dense")
    for cell in results:
        cell["dense"] = dense_summary(dense_times, failed, settings, length)
        if cell["status"] == "ok":
            cell |= _summary(cell, part(times, cell["score"]), dense_times, settings)
    return results


def usable_baselines(
    inputs: Inputs, attends: dict[str, dense.Attend]
) -> tuple[dict[str, Run], dict[str, str]]:
    """Return the dense kernels that run these inputs and are right, and why the others are not."""
    usable, failed = {}, {}
    length = inputs.k.shape[2]
    first = length - inputs.q.shape[2]
    rows = sorted({first, (first + length) // 2, length - 1})
    for name, attend in attends.items():
        try:
            gate.check_dense(attend(*inputs), inputs, rows)
        except (RuntimeError, gate.GateError) as error:  # out of memory is a RuntimeError too
            failed[name] = str(error).partition("\n")[0][:200]
            continue
        usable[name] = Run(lambda attend=attend: attend(*inputs))
    return usable, failed


def causal_pairs(settings: Settings, length: int) -> int:
    """Count the pairs of dense causal attention over all heads."""
    return settings.batch * settings.heads * length * (length + 1) // 2


def dense_summary(
    times: dict[str, Times],
    failed: dict[str, str],
    settings: Settings,
    length: int,
    *,
    products: int = 2,
) -> dict[str, Any]:
    """Return the dense kernels' times, rates, and the fastest one's name.

    Args:
        times: By kernel.
        failed: Kernels that do not run, with the reason.
        settings: Gives the shape.
        length: ``K``.
        products: Matrix products for each pair: 2 forward, 5 backward.
    """
    work = 2 * products * settings.dim * causal_pairs(settings, length)
    return {
        "times": {name: time.to_dict() for name, time in times.items()},
        "flops": {name: work / time.median for name, time in times.items()},
        "fastest": dense.fastest(times) if times else None,
        "failed": failed,
    }


def part(times: dict[str, Times], prefix: str) -> dict[str, Times]:
    """Return the runs whose name begins with a word, without that word."""
    return {
        name.removeprefix(f"{prefix} "): time
        for name, time in times.items()
        if name.startswith(f"{prefix} ")
    }


def _steps(
    engine: Engine, keep: int, inputs: Inputs, score: Tensor, mask: Lifetimes
) -> dict[str, Run]:
    length, q_len = inputs.k.shape[2], inputs.q.shape[2]
    prepare = engine.prepare
    steps = {
        "total": Run(lambda: engine.everything(inputs, score, score, keep)),
        "selection": Run(lambda: engine.select(score, keep)),
        "attention": Run(lambda: engine.attend(*inputs, mask, score)),
    }
    if prepare is None:
        steps["first"] = Run(
            lambda fresh: engine.attend(*inputs, fresh, score), lambda: unused(mask)
        )
    else:
        steps["schedule"] = Run(lambda fresh: prepare(fresh, q_len, length), lambda: unused(mask))
    return steps


def _summary(
    cell: dict[str, Any],
    times: dict[str, Times],
    dense_times: dict[str, Times],
    settings: Settings,
) -> dict[str, Any]:
    attention, total = times["attention"], times["total"]
    if "schedule" in times:
        schedule = times["schedule"].median
    else:
        schedule = max(0.0, times["first"].median - attention.median)
    before = times["selection"].median + schedule
    summary: dict[str, Any] = {
        "times": {name: time.to_dict() for name, time in times.items()},
        "schedule": schedule,
        "share_before_attention": before / (before + attention.median),
        "useful_flops": 4 * settings.dim * cell["pairs"] / attention.median,
    }
    if dense_times:
        best = dense_times[dense.fastest(dense_times)]
        summary["ratio"] = ratio(best, total)
        summary["ratio_attention"] = ratio(best, attention)
    return summary
