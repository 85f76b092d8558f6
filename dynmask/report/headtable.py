"""The table of all heads: of one plan, or of two beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from dynmask.report.explorer import Shown
from dynmask.report.heads import LONG_LENGTH, HeadView
from dynmask.report.html import number, percent, sort_key
from dynmask.report.tables import sortable


def heads_table(plans: Sequence[Shown]) -> str:
    """Return one sortable row for each head."""
    if len(plans) > 1:
        return _compared(plans[0].views, plans[1].views)
    names = ["Layer, head", "Coverage", "Worst tenth", "Corner", "Columns", "Offsets"]
    names += [f"Density {number(length, 0)}" for length in (plans[0].length, LONG_LENGTH)]
    rows = "".join(
        f"{_start(index, view)}{_share(view.coverage)}{_share(view.tail_coverage)}"
        f"{_share(view.corner_coverage)}<td>{view.columns}</td><td>{view.offsets}</td>"
        f"{_share(view.density)}{_share(view.density_long)}<td>{view.gate}</td></tr>"
        for index, view in enumerate(plans[0].views)
    )
    return sortable(
        "Every head in figures; shares in percent",
        [*names, "Gate"],
        f"<tbody>{rows}</tbody>",
        tall=True,
    )


def changes(first: Sequence[HeadView], second: Sequence[HeadView]) -> tuple[int, int]:
    """Return how many heads the gate keeps static only in the first, and only in the second."""
    pairs = list(zip(first, second, strict=True))
    return sum(b.gated > a.gated for a, b in pairs), sum(a.gated > b.gated for a, b in pairs)


def _compared(first: Sequence[HeadView], second: Sequence[HeadView]) -> str:
    long = number(LONG_LENGTH, 0)
    names = ["Layer, head"]
    for what in ("Coverage", f"Density {long}"):
        names += [f"{what} {mark}" for mark in ("A", "B", "B\u00a0−\u00a0A")]
    rows = []
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        gate = a.gate if a.gate == b.gate else f"<b>{a.gate} → {b.gate}</b>"
        # Sorted from below: static in both, gated in both, and what changes last.
        order = 2 * (a.gated != b.gated) + a.gated
        rows.append(
            f"{_start(index, a)}{_pair(a.coverage, b.coverage)}"
            f"{_pair(a.density_long, b.density_long)}<td{sort_key(order)}>{gate}</td></tr>"
        )
    return sortable(
        "Every head in both plans; shares in percent, differences in points",
        [*names, "Gate"],
        f"<tbody>{''.join(rows)}</tbody>",
        tall=True,
    )


def _start(index: int, view: HeadView) -> str:
    return (
        f'<tr id="{view.row}"><th scope="row" data-value="{index}">'
        f'<a href="#sheet-0-{view.layer}" data-head="{index}">{view.layer}, {view.head}</a></th>'
    )


def _share(value: float) -> str:
    return f"<td>{percent(value)}</td>"


def _pair(a: float, b: float) -> str:
    size = percent(abs(b - a))
    sign = "" if float(size) == 0 else "+" if b > a else "−"
    return f"{_share(a)}{_share(b)}<td{sort_key(b - a)}>{sign}{size}</td>"
