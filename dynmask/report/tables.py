"""The quality and the speed table.

The script sorts rows within each body: those of one task, or of one length.

A cell that loses against full attention is marked by a word, not by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from dynmask.report.html import (
    escape,
    interval_text,
    mode_name,
    number,
    percent,
    score_text,
    scroll,
    sort_key,
)
from dynmask.report.results import MODES, QualityRow, SpeedRow


def mode_order(mode: str) -> int:
    """Return a mode's place in the tables; unknown modes come last."""
    return list(MODES).index(mode) if mode in MODES else len(MODES)


def by_task(rows: Sequence[QualityRow]) -> list[tuple[str, list[QualityRow]]]:
    """Group rows by task in order of first appearance, modes in the order of `MODES`."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    return [
        (task, sorted((r for r in rows if r.task == task), key=lambda r: mode_order(r.mode)))
        for task in tasks
    ]


def below_full(row: QualityRow, full: QualityRow | None) -> bool:
    """Return whether `row` is worse than `full` by more than the two 95 % intervals explain.

    Without intervals, any worse score counts.
    """
    if full is None or row.mode == "full":
        return False
    worst_full, best_row = full.score, row.score
    if full.interval is not None and row.interval is not None:
        worst_full = full.interval[0 if row.metric == "accuracy" else 1]
        best_row = row.interval[1 if row.metric == "accuracy" else 0]
    return best_row < worst_full if row.metric == "accuracy" else best_row > worst_full


def quality_table(rows: Sequence[QualityRow]) -> str:
    """Return the table task x mode: score, 95 % interval, n, density, seconds."""
    bodies = []
    for task, members in by_task(rows):
        full = next((row for row in members if row.mode == "full"), None)
        lines = []
        for row in members:
            loss = below_full(row, full)
            mark = ' <span class="loss">worse</span>' if loss else ""
            lines.append(
                f"<tr{' class=losing' if loss else ''}>"
                f'<th scope="row">{escape(mode_name(row.mode))}{mark}</th>'
                f"<td{sort_key(row.score)}>{score_text(row)}</td>"
                f"<td{sort_key(_low(row.interval))}>{interval_text(row)}</td>"
                f"<td{sort_key(row.n)}>{row.n}</td>{_shares(row)}"
                f"<td{sort_key(row.seconds)}>{number(row.seconds, 1)}</td></tr>"
            )
        better = "more is better" if members[0].metric == "accuracy" else "less is better"
        bodies.append(
            f'<tbody><tr class="group"><th colspan="7" scope="rowgroup">{escape(task)} '
            f"<small>{escape(members[0].metric)}, {better}</small></th></tr>"
            + "".join(lines)
            + "</tbody>"
        )
    names = ["Mode", "Score", "95\u00a0%\u00a0interval", "n", "Density", "Computed", "Time, s"]
    return sortable("Quality of each mode, by task", names, "".join(bodies))


def speed_table(rows: Sequence[SpeedRow]) -> str:
    """Return the table length x mode: seconds, ratio to the baseline, both with their spread."""
    ordered = sorted(rows, key=lambda row: (row.length, row.baseline, mode_order(row.mode)))
    bodies = []
    for (length, baseline), group in groupby(ordered, key=lambda row: (row.length, row.baseline)):
        members = list(group)
        lines = []
        for row in members:
            loss = row.ratio < 1 and row.mode != "full"
            mark = ' <span class="loss">slower</span>' if loss else ""
            lines.append(
                f"<tr{' class=losing' if loss else ''}>"
                f'<th scope="row">{escape(mode_name(row.mode))}{mark}'
                f'<small class="impl">{escape(row.impl)}</small></th>'
                f"<td{sort_key(row.seconds)}>{number(row.seconds, 3)}</td>"
                f"<td{sort_key(_low(row.spread))}>"
                f"{number(row.spread[0], 3)}–{number(row.spread[1], 3)}</td>"
                f"<td{sort_key(row.ratio)}>{number(row.ratio)}\u00a0×</td>"
                f"<td{sort_key(_low(row.ratio_spread))}>"
                f"{number(row.ratio_spread[0])}–{number(row.ratio_spread[1])}</td>"
                f"{_shares(row)}</tr>"
            )
        bodies.append(
            f'<tbody><tr class="group"><th colspan="7" scope="rowgroup">{number(length, 0)} tokens '
            f"<small>baseline: {escape(baseline)}; {members[0].repeats} repeats</small></th></tr>"
            + "".join(lines)
            + "</tbody>"
        )
    names = ["Mode", "Median, s", "Spread, s", "Speed-up", "Spread", "Density", "Computed"]
    return sortable("Prefill time of each mode, by length", names, "".join(bodies))


def sortable(caption: str, names: Sequence[str], bodies: str, *, tall: bool = False) -> str:
    """Return a table in its scrolling region; the script lets its columns sort.

    Args:
        caption: What the table shows.
        names: Of the columns.
        bodies: HTML of one or more ``tbody``; rows of the class ``group`` stay first in theirs.
        tall: As for `scroll`.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    return scroll(
        caption,
        f'<table class="sortable"><caption class="unseen">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>{bodies}</table>",
        tall=tall,
    )


def _low(ends: tuple[float, float] | None) -> float:
    return ends[0] if ends else math.nan


def _shares(row: QualityRow | SpeedRow) -> str:
    return "".join(
        f"<td{sort_key(share)}>{percent(share)}\u00a0%</td>"
        for share in (row.density, row.computed)
    )
