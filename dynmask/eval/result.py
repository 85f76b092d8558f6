"""What an evaluation returns, and the statistics that it is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DEPTH_BINS = 10
Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Part:
    """The score of one slice of an evaluation.

    Attributes:
        label: what the slice is, such as ``"10-20 %"`` of the depth or ``"1K-2K"`` of the
            positions.
        n: questions or tokens in the slice.
        score: same unit as the whole result's; None if the slice is empty.
    """

    label: str
    n: int
    score: float | None


@dataclass(frozen=True)
class Result:
    """The outcome of one evaluation of one model.

    Attributes:
        task: what was run, such as ``"longeval"``.
        metric: unit of the score: ``"accuracy"`` (0 to 1) or ``"perplexity"`` (per token).
        n: questions asked, or windows read.
        score: the figure over all n.
        interval: 95 % interval of `score`: Wilson's for an accuracy, from the scatter of the
            windows for a perplexity; None for a single window.
        parts: `score` by depth of the asked fact or by position of the token.
        prompt_tokens: mean tokens of a prompt, question included, or of a window.
        seconds: wall-clock time of the model's part, with tokenisation left out.
        settings: everything needed to run it again.
        metrics: further figures by name.
        rows: one mapping for each question or window: what was expected and what came out.
    """

    task: str
    metric: str
    n: int
    score: float
    interval: tuple[float, float] | None
    parts: tuple[Part, ...]
    prompt_tokens: float
    seconds: float
    settings: Mapping[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)
    rows: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A plain dict of what `json.dumps` takes, raw rows included."""
        return {
            "task": self.task,
            "metric": self.metric,
            "n": self.n,
            "score": self.score,
            "interval": None if self.interval is None else list(self.interval),
            "parts": [{"label": p.label, "n": p.n, "score": p.score} for p in self.parts],
            "prompt_tokens": self.prompt_tokens,
            "seconds": self.seconds,
            "settings": dict(self.settings),
            "metrics": dict(self.metrics),
            "rows": [dict(row) for row in self.rows],
        }

    def table_row(self) -> tuple[str, ...]:
        """The cells of one line of a table, under the headings of `TABLE_HEAD`."""
        return (
            self.task,
            str(self.n),
            f"{self.prompt_tokens:,.0f}",
            self._cell(self.score),
            "" if self.interval is None else " to ".join(self._cell(x) for x in self.interval),
            f"{self.seconds:.1f}",
        )

    def _cell(self, score: float) -> str:
        return f"{100 * score:.1f} %" if self.metric == "accuracy" else f"{score:.3f}"


TABLE_HEAD = ("task", "n", "tokens", "score", "95 % interval", "seconds")
"""Headings for `Result.table_row`."""


def wilson(correct: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion.

    ``(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`` with p = correct / n and z = 1.96.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA
        22 (1927).

    Raises:
        ValueError: n is below 1, or `correct` is not between 0 and n.
    """
    if n < 1:
        raise ValueError(f"n={n}: an interval needs at least one trial")
    if not 0 <= correct <= n:
        raise ValueError(f"correct={correct} must lie between 0 and n={n}")
    p, z2 = correct / n, Z95 * Z95
    middle = p + z2 / (2 * n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low, high = (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)
    # Rounding must not push the ends past what the formula gives exactly at 0 and n.
    return (0.0 if correct == 0 else low, 1.0 if correct == n else high)


def by_depth(depths: Sequence[float], correct: Sequence[bool]) -> tuple[Part, ...]:
    """Accuracy in ten equal bins of the depth: 0 is the prompt's start, 1 its end."""
    bins: list[list[bool]] = [[] for _ in range(DEPTH_BINS)]
    for depth, hit in zip(depths, correct, strict=True):
        bins[min(int(depth * DEPTH_BINS), DEPTH_BINS - 1)].append(hit)
    return tuple(
        Part(f"{10 * i}-{10 * (i + 1)} %", len(hits), sum(hits) / len(hits) if hits else None)
        for i, hits in enumerate(bins)
    )


def accuracy_result(
    task: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    seconds: float,
    settings: Mapping[str, Any],
) -> Result:
    """The result of questions that are right or wrong.

    Args:
        task: name of the task.
        rows: one for each question, with at least ``correct``, ``depth`` (0 to 1) and
            ``prompt_tokens``.
        seconds: wall-clock time.
        settings: everything needed to run it again.
    """
    hits = [bool(row["correct"]) for row in rows]
    return Result(
        task=task,
        metric="accuracy",
        n=len(rows),
        score=sum(hits) / len(hits),
        interval=wilson(sum(hits), len(hits)),
        parts=by_depth([row["depth"] for row in rows], hits),
        prompt_tokens=sum(row["prompt_tokens"] for row in rows) / len(rows),
        seconds=seconds,
        settings=settings,
        rows=tuple(rows),
    )
