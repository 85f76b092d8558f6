"""Bar charts as inline SVG.

The charts have no viewBox: widths are percentages and text keeps its size, so that they stay
readable on a narrow screen.
"""

from __future__ import annotations

from collections.abc import Sequence

from dynmask.report.html import escape, mode_name, percent, score_text
from dynmask.report.results import QualityRow
from dynmask.report.tables import by_task

_ROW_HEIGHT = 52


def quality_charts(rows: Sequence[QualityRow]) -> str:
    """Return one figure for each task: score with its interval above density, mode by mode."""
    figures = "".join(_task_chart(task, members) for task, members in by_task(rows))
    return f'<div class="charts">{figures}</div>'


def _task_chart(task: str, rows: Sequence[QualityRow]) -> str:
    accuracy = rows[0].metric == "accuracy"
    limit = 1.0 if accuracy else max((r.interval or (0, r.score))[1] for r in rows) or 1.0
    bars = []
    for index, row in enumerate(rows):
        top = index * _ROW_HEIGHT
        share = 100 * min(max(row.score / limit, 0), 1)
        bars.append(
            f'<text class="name" x="0" y="{top + 15}">{escape(mode_name(row.mode))}</text>'
            f'<text class="value" x="100%" y="{top + 15}" text-anchor="end">{score_text(row)} at '
            f"density {percent(row.density)}\u00a0%</text>"
            f'<rect class="track" x="0" y="{top + 22}" width="100%" height="10"/>'
            f'<rect class="score" x="0" y="{top + 22}" width="{share:.2f}%" height="10"/>'
            f'<rect class="density" x="0" y="{top + 34}" width="{100 * row.density:.2f}%" '
            'height="5"/>'
        )
        if row.interval is not None:
            low, high = (100 * min(max(end / limit, 0), 1) for end in row.interval)
            bars.append(
                f'<line class="whisker" x1="{low:.2f}%" x2="{high:.2f}%" y1="{top + 27}" '
                f'y2="{top + 27}"/>'
            )
    words = "; ".join(
        f"{mode_name(row.mode)} {score_text(row)} at density {percent(row.density)} %"
        for row in rows
    )
    unit = "accuracy, 0 to 100\u00a0%" if accuracy else f"{rows[0].metric}, less is better"
    return (
        f"<figure><figcaption>{escape(task)} <small>{escape(unit)}</small></figcaption>"
        f'<svg class="bars" width="100%" height="{len(rows) * _ROW_HEIGHT}" role="img" '
        f'aria-label="{escape(f"{task}: {words}")}">{"".join(bars)}</svg></figure>'
    )
