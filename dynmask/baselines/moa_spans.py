"""The spans of MoA: how wide, how dense, and which rule for which head within a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def span_at(alpha: float, beta: float, length: int, *, sinks: int) -> int:
    """Return how many keys a head sees at a length: ``alpha + beta length``, rounded down.

    At least the sinks and the own key, at most all: row ``i`` sees ``j < sinks`` and
    ``i - j < span - sinks``.

    Args:
        alpha: Keys.
        beta: Share of the length.
        length: Tokens ``N`` of the sequence.
        sinks: First keys.
    """
    # What rounding takes from a product (0.29 * 100 < 29) must not cost a key.
    span = math.floor(alpha + beta * length + 1e-9)
    return min(max(span, sinks + 1), length)


def span_density(span: int, length: int) -> float:
    """Return the share of the causal pairs of a sequence that a span shows.

    Row ``i`` sees ``min(i + 1, span)`` keys, however many of them are sinks.
    """
    span = min(span, length)
    return (span * (span + 1) / 2 + (length - span) * span) / (length * (length + 1) / 2)


def choose_rules(
    loss: Sequence[Sequence[float]], cost: Sequence[float], *, budget: float
) -> list[int]:
    r"""Choose one rule per head for the least total loss at a mean cost within the budget.

    Only the rules on the lower convex hull of a head's points ``(cost, loss)`` can be in the
    optimum of the linear relaxation (heads may mix rules), and along a hull each step gains less
    per cost than the one before. So all heads' steps are taken in order of gain per cost, from the
    cheapest rules on: the first that does not fit is where the relaxation would take a part of a
    step. A head whose next step does not fit stays where it is, the others go on while theirs fit.

    The total loss is so above the optimum by less than the gain of that one step, and is the
    optimum where the budget ends with a step.

    Args:
        loss: ``[heads][rules]``.
        cost: ``[rules]``, that of any head.
        budget: Largest mean cost of a head.

    Returns:
        A rule for each head. Of equal gains per cost the earlier head's is taken first.

    Raises:
        ValueError: The cheapest rules are beyond the budget.

    Source: Sinha and Zoltners, The Multiple-Choice Knapsack Problem, Operations Research 27
    (1979), in place of the paper's mixed-integer program.
    """
    if min(cost) > budget:
        raise ValueError(
            f"density={budget} is below {min(cost):.4f}, that of the smallest of rules: allow "
            "more, or add smaller spans"
        )
    hulls = [_hull(points, cost) for points in loss]
    steps = sorted(
        (-_gain(points, cost, a, b), head, place)
        for head, (points, hull) in enumerate(zip(loss, hulls, strict=True))
        for place, (a, b) in enumerate(itertools.pairwise(hull), start=1)
    )
    left = budget * len(loss) - sum(cost[hull[0]] for hull in hulls)
    at = [0] * len(loss)
    for _, head, place in steps:
        more = cost[hulls[head][place]] - cost[hulls[head][place - 1]]
        # Sums of shares round; a head that could not take its last step takes no later one.
        if at[head] == place - 1 and more <= left + 1e-9:
            at[head] = place
            left -= more
    return [hull[place] for hull, place in zip(hulls, at, strict=True)]


def _gain(loss: Sequence[float], cost: Sequence[float], a: int, b: int) -> float:
    """Return how much loss rule ``b`` saves per cost that it has above rule ``a``."""
    return (loss[a] - loss[b]) / (cost[b] - cost[a])


def _hull(loss: Sequence[float], cost: Sequence[float]) -> list[int]:
    """Return the rules of the lower convex hull, dearer and dearer while the loss falls."""
    hull: list[int] = []
    for rule in sorted(range(len(cost)), key=lambda r: (cost[r], loss[r])):
        if hull and loss[rule] >= loss[hull[-1]]:
            continue
        while len(hull) > 1 and _gain(loss, cost, hull[-1], rule) >= _gain(loss, cost, *hull[-2:]):
            hull.pop()
        hull.append(rule)
    return hull
