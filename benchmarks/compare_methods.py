"""The methods of `compare.py`: each with one knob, set so that its measured density is a target."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from compare_moa import influence, rules

from dynmask import accelerate
from dynmask.baselines import METHODS, MoA, Policy
from dynmask.dam.dynamic import Dynamic


@dataclass(frozen=True)
class Method:
    """How a method is set.

    Attributes:
        name: In tables.
        policy: A name in `dynmask.baselines.METHODS`; "dynamic" for dynamic masks; "capped" for
            these with a hard cap on the cache.
        paths: "prefill" and "decode": the tasks it takes part in.
        knobs: Settings that grow together: each is its factor times one number, rounded if that
            number is a count.
        settings: The others.
        share: The number is one in (0, 1), not a count.
        range: Its ends; None for the length of the prompt as the upper one of a count.
        whole: Prompt and question are read in one call.
        n: Questions at most: for slow methods.
        probes: Prompts for the density, in place of the configuration's.
        values: In place of target densities: the numbers to try.
        only: Values for decode tasks, if fewer.
    """

    name: str
    policy: str
    paths: tuple[str, ...]
    knobs: dict[str, float]
    settings: dict[str, Any] = field(default_factory=dict)
    share: bool = False
    range: tuple[float, float | None] = (1, None)
    whole: bool = False
    n: int | None = None
    probes: int | None = None
    values: tuple[float, ...] = ()
    only: tuple[float, ...] | None = None

    @classmethod
    def read(cls, name: str, raw: dict[str, Any]) -> Method:
        """Make one of what a configuration holds."""
        lists = ("paths", "range", "values", "only")
        made = {key: tuple(value) if key in lists else value for key, value in raw.items()}
        return cls(name=name, **{"policy": name, **made})

    def given(self, number: float) -> dict[str, Any]:
        """All settings at a number of the knob."""
        return self.settings | {
            knob: factor * number if self.share else max(1, round(factor * number))
            for knob, factor in self.knobs.items()
        }


def attached(
    method: Method, model: Any, settings: dict[str, Any], context: dict[str, Any]
) -> AbstractContextManager[Any]:
    """Accelerate the model by a method at some settings.

    Args:
        method: Which.
        model: The model.
        settings: From `Method.given`; ``density`` is MoA's, ``cap`` is that of a capped cache.
        context: Kept for the model: the profile of MoA.
    """
    if method.policy in ("dynamic", "capped"):
        known = {f.name for f in dataclasses.fields(Dynamic)}
        dynamic = Dynamic(**{name: value for name, value in settings.items() if name in known})
        return accelerate(model, mode="dynamic", dynamic=dynamic)
    policy: Policy
    if method.policy == "moa":
        policy = _moa(model, context, **settings)
    else:
        policy = METHODS[method.policy](**settings)
    return accelerate(model, policy=policy)


def _moa(model: Any, context: dict[str, Any], *, density: float, **settings: Any) -> MoA:
    lengths = context["lengths"]
    candidates = rules(lengths, sinks=settings["sinks"])
    if "influence" not in context:
        context["influence"] = influence(
            model, context["windows"], rules=candidates, sinks=settings["sinks"]
        )
    return MoA.from_influence(
        context["influence"], rules=candidates, lengths=lengths, density=density, **settings
    )


@dataclass(frozen=True)
class Found:
    """A number of the knob, the density measured there, and how many were tried."""

    number: float
    density: float
    tried: int


def calibrated(
    measure: Callable[[float], float],
    target: float,
    *,
    low: float,
    high: float,
    share: bool,
    guess: float | None = None,
    tolerance: float = 0.03,
    steps: int = 8,
) -> Found:
    """Find the number at which a density that grows with it is closest to a target.

    The secant of the last two tries, as if the density were a power of the number; where that
    leaves what is known to lie around the target, the middle.

    Args:
        measure: The density at a number; a ValueError says that the number is too small.
        target: The density.
        low: Least number.
        high: Largest number.
        share: Whether the number is a share, else a count.
        guess: Tried first.
        tolerance: Relative: good enough.
        steps: Numbers tried at most.

    Raises:
        ValueError: As ``measure``, if no number that was tried has a density.
    """
    tried: dict[float, float] = {}
    error: ValueError | None = None
    number = (low + high) / 2 if guess is None else min(max(guess, low), high)
    for _ in range(steps):
        number = number if share else float(math.floor(number))
        if number in tried:
            break
        try:
            tried[number] = density = measure(number)
        except ValueError as refused:
            error, low = refused, number
            number = (low + high) / 2
            continue
        if abs(density / target - 1) <= tolerance:
            break
        low, high = (low, number) if density > target else (number, high)
        wanted = _secant(list(tried.items())[-2:], target, power=2.0 if share else 1.0)
        margin = 0.02 * (high - low) if share else 1.0
        number = wanted if low + margin <= wanted <= high - margin else (low + high) / 2
    if not tried:
        assert error is not None
        raise error
    best = min(tried, key=lambda number: abs(tried[number] - target))
    return Found(best, tried[best], len(tried))


def _secant(points: list[tuple[float, float]], target: float, *, power: float) -> float:
    """Where a power law through the points has the target; with one point, of the given power."""
    number, density = points[-1]
    if min(number, density) <= 0:
        return -math.inf
    if len(points) == 2 and min(points[0]) > 0 and points[0][1] != density:
        power = math.log(density / points[0][1]) / math.log(number / points[0][0])
    if power < 0.05:  # Nearly flat, or falling: nothing to go by.
        return -math.inf
    return number * (target / density) ** (1 / power)
