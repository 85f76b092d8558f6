"""Results as tables of at most 80 columns."""

from __future__ import annotations

from dynmask.cli.console import Output
from dynmask.report import Results
from dynmask.report.html import interval_text, percent, score_text
from dynmask.report.tables import below_full, by_task, mode_order


def print_results(output: Output, results: Results) -> None:
    """Print the quality and the speed table, whichever has rows."""
    output.say(
        f"{results.model} on {results.machine['processor']}, {results.machine['threads']} threads",
        style="bold",
    )
    if results.quality:
        _quality(output, results)
    if results.speed:
        _speed(output, results)


def _quality(output: Output, results: Results) -> None:
    rows, breaks = [], []
    for task, members in by_task(results.quality):
        full = next((row for row in members if row.mode == "full"), None)
        for index, row in enumerate(members):
            rows.append(
                [
                    task if index == 0 else "",
                    row.mode + (" −" if below_full(row, full) else ""),
                    score_text(row),
                    interval_text(row),
                    str(row.n),
                    f"{percent(row.density)} %",
                    f"{row.seconds:.1f}",
                ]
            )
        breaks.append(len(rows) - 1)
    columns = ["task", "mode", "score", "95 %\ninterval", "n", "density", "s"]
    output.table("", columns, rows, left=2, breaks=breaks)
    if any(row[1].endswith("−") for row in rows):
        output.say(
            "− worse than full attention; intervals, where there are two, do not meet", style="dim"
        )


def _speed(output: Output, results: Results) -> None:
    ordered = sorted(results.speed, key=lambda row: (row.length, mode_order(row.mode)))
    rows = [
        [
            f"{row.length} tokens" if row.mode == "full" else "",
            row.mode + (" −" if row.ratio < 1 else ""),
            f"{row.seconds:.3f}",
            f"{row.ratio:.2f} ×",
            f"{row.ratio_spread[0]:.2f}–{row.ratio_spread[1]:.2f}",
            f"{percent(row.density)} %",
            f"{percent(row.computed)} %",
        ]
        for row in ordered
    ]
    columns = ["prefill", "mode", "median\ns", "speed-up", "spread", "density", "computed"]
    output.table("", columns, rows, left=2)
    output.say(
        f"speed-up over {ordered[0].baseline}, {ordered[0].repeats} repeats in turn"
        + ("; − slower" if any(row.ratio < 1 for row in ordered) else ""),
        style="dim",
    )
