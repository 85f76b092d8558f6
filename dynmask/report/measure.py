"""Measure quality and prefill time of a model in several modes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dynmask.report.results import QualityRow, SpeedRow

if TYPE_CHECKING:
    from dynmask.baselines import Policy
    from dynmask.dam import MaskPlan
    from dynmask.eval import Result
    from dynmask.hf import Run

Progress = Callable[[int, int, str], None]


def running(
    model: Any,
    plan: MaskPlan | None,
    mode: str,
    coverage: float | None = None,
    *,
    policy: Policy | None = None,
) -> AbstractContextManager[Run | None]:
    """Return a context in which `model` runs in `mode`; ``"full"`` leaves the model as it is.

    With a policy it runs under that method, whatever the mode.

    The context's value is the run, or None for ``"full"``.

    Raises:
        ValueError: See `dynmask.accelerate`.
    """
    from dynmask.hf import accelerate

    if policy is not None:
        return accelerate(model, policy=policy)
    if mode == "full":
        return nullcontext()
    return accelerate(model, plan, mode=mode, coverage=coverage)


@dataclass(frozen=True)
class Cost:
    """What a run's calls looked at, evaluated, and were run by; see `QualityRow`."""

    density: float
    computed: float
    impl: str
    decode: float | None = None

    @classmethod
    def of(cls, model: Any, run: Run | None) -> Cost:
        """Read the cost off a run's statistics; without a run, all pairs by the model itself."""
        if run is None:
            return cls(1.0, 1.0, baseline_name(model))
        stats = run.stats()
        calls = stats["impl"]["prefill"]
        return cls(
            density=stats["density"]["prefill"],
            computed=stats["computed_density"]["prefill"],
            impl=", ".join(f"{name} × {count}" for name, count in calls.items()),
            decode=stats["density"].get("decode"),
        )


def quality_row(result: Result, mode: str, cost: Cost) -> QualityRow:
    """Turn an evaluation's result into a row of the table."""
    return QualityRow(
        task=title(result),
        mode=mode,
        metric=result.metric,
        score=result.score,
        interval=result.interval,
        n=result.n,
        density=cost.density,
        computed=cost.computed,
        seconds=result.seconds,
        impl=cost.impl,
        settings={**result.settings, "prompt_tokens": round(result.prompt_tokens)},
        decode=cost.decode,
        metrics=dict(result.metrics),
    )


def title(result: Result) -> str:
    """Return the task's name with its size, as tables show it."""
    settings = result.settings
    if "lines" in settings:
        return f"{'LongEval' if result.task == 'longeval' else 'Recall'}, {settings['lines']} lines"
    if "pairs" in settings:
        name = "Key-value" if result.task == "keyvalue" else "Recall key-value"
        return f"{name} {settings['form']}, {settings['pairs']} pairs"
    if result.task == "ruler":
        return f"RULER {settings['kind']}, {settings['length']} tokens"
    name = result.task.capitalize() if result.task != "needle" else "Needles"
    return f"{name}, {settings['length']} tokens"


def baseline_name(model: Any) -> str:
    """Return the name of the attention that the model runs by itself.

    transformers hides nothing in a single prompt without padding, so its "sdpa" is torch's
    scaled_dot_product_attention with ``is_causal=True``.
    """
    name = model.config._attn_implementation
    return "torch SDPA, is_causal" if name == "sdpa" else str(name)


def prefill_rows(
    model: Any,
    plan: MaskPlan,
    ids: Sequence[int],
    *,
    modes: Sequence[str],
    repeats: int,
    progress: Progress | None = None,
) -> list[SpeedRow]:
    """Time the prefill of one prompt in several modes.

    Each repeat times every mode once, so that a change of the machine's speed meets all of them,
    and the ratio is taken within the repeat. The plan is attached anew each time: what a mask costs
    to prepare at this length is part of its time. One untimed round comes first.

    Args:
        model: A causal language model of transformers.
        plan: Its plan.
        ids: Token ids of the prompt.
        modes: Modes to time; ``"full"`` is added in front if it is missing, as the baseline.
        repeats: Timed rounds, at least 1.
        progress: Called as ``progress(done, total, text)``.

    Returns:
        One row for each mode, the baseline first.

    Raises:
        ValueError: `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    order = ["full", *(mode for mode in modes if mode != "full")]
    seconds: dict[str, list[float]] = {mode: [] for mode in order}
    costs: dict[str, Cost] = {}
    total = (repeats + 1) * len(order)
    for turn in range(repeats + 1):
        # Each round begins with another mode, so that none always follows the same one.
        first = turn % len(order)
        for place, mode in enumerate(order[first:] + order[:first]):
            taken, costs[mode] = _prefill(model, plan, ids, mode)
            if turn > 0:
                seconds[mode].append(taken)
            if progress is not None:
                progress(turn * len(order) + place + 1, total, f"{len(ids)} tokens")
    return [
        _speed_row(
            mode,
            len(ids),
            seconds=seconds[mode],
            full=seconds["full"],
            cost=costs[mode],
            baseline=baseline_name(model),
        )
        for mode in order
    ]


def _prefill(model: Any, plan: MaskPlan, ids: Sequence[int], mode: str) -> tuple[float, Cost]:
    from dynmask.eval.runner import Prefill, evaluating

    cuda = next(model.parameters()).is_cuda
    with evaluating(model), running(model, plan, mode) as run:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        Prefill(model, ids)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, Cost.of(model, run)


def _speed_row(
    mode: str,
    length: int,
    *,
    seconds: Sequence[float],
    full: Sequence[float],
    cost: Cost,
    baseline: str,
) -> SpeedRow:
    ratios = [base / own for base, own in zip(full, seconds, strict=True)]
    return SpeedRow(
        mode=mode,
        length=length,
        seconds=statistics.median(seconds),
        spread=(min(seconds), max(seconds)),
        ratio=statistics.median(ratios),
        ratio_spread=(min(ratios), max(ratios)),
        density=cost.density,
        computed=cost.computed,
        impl=cost.impl,
        repeats=len(seconds),
        baseline=baseline,
    )
