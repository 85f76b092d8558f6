"""``dynmask bench backward``: gradients of q, k, v and bias, against dense causal kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dynmask.bench import dense, gate
from dynmask.bench.engine import Engine, unused, visible_pairs
from dynmask.bench.inputs import Inputs, Settings, make_inputs, make_score
from dynmask.bench.op import causal_pairs, dense_summary, part
from dynmask.bench.timing import Clock, Run, Times, measure, peak_memory, ratio
from dynmask.masks import Lifetimes

Forward = Callable[[Inputs, Tensor], Tensor]


def cells(settings: Settings, engine: Engine, clock: Clock, length: int) -> list[dict[str, Any]]:
    """Measure one length: the dense kernels once, ours for every kind of score.

    Runs of a cell: ``backward`` is the backward pass of a mask that no pass has seen but the
    forward, with whatever schedule it needs; ``repeated`` the same with all schedules made;
    ``both`` is selection, forward and backward. Memory is the peak of ``both``, with q, k, v and
    the output's gradient.
    """
    inputs = make_inputs(settings, length)
    grad_out = make_inputs(replace(settings, seed=settings.seed + 1), length).q
    baselines, failed = _usable(inputs, grad_out)
    runs: dict[str, Run] = {}
    for name, forward in baselines.items():
        runs[f"dense {name}"] = _gradients_alone(forward, inputs, None, grad_out)
        runs[f"both {name}"] = Run(_whole(forward, inputs, None, grad_out))
    results: list[dict[str, Any]] = []
    for kind in settings.scores:
        score = make_score(settings, kind, length)
        cell: dict[str, Any] = {"length": length, "score": kind, "status": "ok"}
        results.append(cell)
        try:
            cell["gate"] = _check(settings, engine, inputs, score, grad_out, kind)
        except gate.GateError as error:
            cell |= {"status": "error", "error": str(error)}
            continue
        mask = engine.select(score, settings.keep)
        cell["pairs"] = visible_pairs(mask, settings.heads)
        cell["density"] = cell["pairs"] / causal_pairs(settings, length)
        steps = _steps(engine, settings.keep, inputs, score, mask, grad_out)
        runs |= {f"{kind} {name}": run for name, run in steps.items()}
    times = measure(
        runs, clock, rounds=settings.rounds, warmups=settings.warmups, budget=settings.budget
    )
    clock.release()
    memory = {
        name: _memory(clock, inputs, grad_out, runs[name])
        for name in runs
        if name.startswith("both ") or name.endswith(" both")
    }
    dense_times = part(times, "dense")
    for cell in results:
        cell["dense"] = {
            **dense_summary(dense_times, failed, settings, length, products=5),
            "both": {name: time.to_dict() for name, time in part(times, "both").items()},
            "peak_bytes": {name: memory[f"both {name}"] for name in dense_times},
        }
        if cell["status"] == "ok":
            ours = part(times, cell["score"])
            cell |= _summary(cell, ours, dense_times, part(times, "both"), settings)
            cell |= _memory_summary(memory, cell["score"])
    return results


def _steps(
    engine: Engine, keep: int, inputs: Inputs, score: Tensor, mask: Lifetimes, grad_out: Tensor
) -> dict[str, Run]:
    def attend(seen: Lifetimes) -> Forward:
        return lambda leaves, bias: engine.attend(*leaves, seen, bias)

    def select_and_attend(leaves: Inputs, bias: Tensor) -> Tensor:
        return engine.everything(leaves, bias.detach(), bias, keep)

    def fresh_graph() -> tuple[Tensor, Sequence[Tensor]]:
        return _graph(attend(unused(mask)), inputs, score)

    return {
        "backward": Run(lambda graph: _grads(graph, grad_out), fresh_graph),
        "repeated": _gradients_alone(attend(mask), inputs, score, grad_out),
        "both": Run(_whole(select_and_attend, inputs, score, grad_out)),
    }


def _graph(
    forward: Forward, inputs: Inputs, bias: Tensor | None
) -> tuple[Tensor, Sequence[Tensor]]:
    """Run a forward pass that keeps its graph; return the output and the leaves."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        added = None if bias is None else bias.detach().requires_grad_()
        out = forward(Inputs(*leaves), added)  # type: ignore[arg-type]
    return out, leaves if added is None else [*leaves, added]


def _grads(
    graph: tuple[Tensor, Sequence[Tensor]], grad_out: Tensor, *, retain: bool = False
) -> tuple[Tensor, ...]:
    out, leaves = graph
    return torch.autograd.grad(out, list(leaves), grad_out, retain_graph=retain)


def _gradients_alone(
    forward: Forward, inputs: Inputs, bias: Tensor | None, grad_out: Tensor
) -> Run:
    """Time the backward pass of one graph again and again."""
    graph = _graph(forward, inputs, bias)
    return Run(lambda: _grads(graph, grad_out, retain=True))


def _whole(
    forward: Forward, inputs: Inputs, bias: Tensor | None, grad_out: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: _grads(_graph(forward, inputs, bias), grad_out)


def _usable(inputs: Inputs, grad_out: Tensor) -> tuple[dict[str, Forward], dict[str, str]]:
    usable: dict[str, Forward] = {}
    failed: dict[str, str] = {}
    length = inputs.k.shape[2]
    for name, attend in dense.causal(inputs.q.device).items():

        def forward(leaves: Inputs, _: Tensor, attend: dense.Attend = attend) -> Tensor:
            return attend(*leaves)

        try:
            graph = _graph(forward, inputs, None)
            gate.check_dense(graph[0].detach(), inputs, [0, length // 2, length - 1])
            _grads(graph, grad_out)
        except (RuntimeError, gate.GateError) as error:
            failed[name] = str(error).partition("\n")[0][:200]
            continue
        usable[name] = forward
    return usable, failed


def _check(
    settings: Settings,
    engine: Engine,
    inputs: Inputs,
    score: Tensor,
    grad_out: Tensor,
    kind: str,
) -> float:
    """Check selection and output, gradients of a short sequence, and those of sampled windows."""
    keep = settings.keep
    mask = engine.select(score, keep)
    rows = gate.sample_rows(score.shape[-1], keep=keep)
    gate.check_selection(mask, score, keep, rows)
    graph = _graph(lambda leaves, bias: engine.attend(*leaves, mask, bias), inputs, score)
    worst = gate.check_rows(graph[0].detach(), inputs, score, score, keep, rows)
    grads = _grads(graph, grad_out)
    worst = max(worst, gate.check_window_backward(grads, inputs, score, mask, grad_out))
    del graph, grads
    # Short enough for a whole matrix in float64, long enough for keys to be evicted.
    length = min(score.shape[-1], 2 * keep + 57)
    share = settings.heads // settings.groups
    groups = min(2, settings.groups)
    small = replace(settings, heads=groups * share, groups=groups, batch=1)
    inputs = make_inputs(small, length)
    score = make_score(small, kind, length)
    grad_out = make_inputs(replace(small, seed=settings.seed + 1), length).q
    mask = engine.select(score, keep)
    graph = _graph(lambda leaves, bias: engine.attend(*leaves, mask, bias), inputs, score)
    seen = gate.seen_rows(score, keep)
    grads = _grads(graph, grad_out)
    return max(worst, gate.check_whole_backward(grads, inputs, score, seen, grad_out))


def _memory(clock: Clock, inputs: Inputs, grad_out: Tensor, run: Run) -> int | None:
    beyond = peak_memory(run, clock.device)
    if beyond is None:
        return None
    return beyond + sum(t.numel() * t.element_size() for t in (*inputs, grad_out))


def _memory_summary(memory: dict[str, int | None], kind: str) -> dict[str, Any]:
    ours, flash = memory[f"{kind} both"], memory.get("both flash")
    return {
        "peak_bytes": ours,
        "peak_over_flash": ours / flash if ours is not None and flash else None,
    }


def _summary(
    cell: dict[str, Any],
    times: dict[str, Times],
    dense_times: dict[str, Times],
    dense_both: dict[str, Times],
    settings: Settings,
) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "times": {name: time.to_dict() for name, time in times.items()},
        "useful_flops": 10 * settings.dim * cell["pairs"] / times["repeated"].median,
    }
    if dense_times:
        best = dense_times[dense.fastest(dense_times)]
        summary["ratio"] = ratio(best, times["backward"])
        summary["ratio_repeated"] = ratio(best, times["repeated"])
        summary["ratio_both"] = ratio(dense_both[dense.fastest(dense_both)], times["both"])
    return summary
