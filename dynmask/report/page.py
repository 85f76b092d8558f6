"""One self-contained HTML page: opens from the disk, loads nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING

from dynmask.report.charts import quality_charts
from dynmask.report.explorer import (
    Shown,
    controls,
    coverage_range,
    data_block,
    grid,
    panel,
    sheets,
    shown,
)
from dynmask.report.heads import LONG_LENGTH, check_comparable
from dynmask.report.headtable import changes, heads_table
from dynmask.report.html import definitions, escape, number, percent
from dynmask.report.machine import machine, versions
from dynmask.report.results import Results
from dynmask.report.tables import quality_table, speed_table

if TYPE_CHECKING:
    from dynmask.dam import MaskPlan

_QUALITY = """<b>Density</b> is the share of the causal pairs that the masks show, over all heads
and prefills of the task; <b>computed</b> is the share that was evaluated to get there, 100&nbsp;%
for a dense kernel. A mode is marked <i>worse</i> where its 95&nbsp;% interval lies wholly on the
bad side of full attention’s, or, where a task gives no interval, where its score is worse."""

_SPEED = """Prefill of one prompt, all modes in turn within each repeat of one process.
<b>Speed-up</b> is the baseline’s time over the mode’s in the same repeat: median, then smallest
and largest. Below 1 the mode is slower than the baseline. What a mask costs to prepare at this
length is part of the mode’s time."""

_COVERAGE = """<b>Coverage</b> is the share of a head’s attention on held-out calibration text that
its columns and offsets keep, on average over {rows}. The gate compares it with the plan’s target
({target}). A framed cell is a head below it, which mode “auto” runs by masks from the input; the
others run static. Rows are layers, columns are heads."""

_COMPARED = """<b>A</b> is {names[0]}, <b>B</b> is {names[1]}. The gate keeps {more} heads static
in B but not in A, and {fewer} in A but not in B. Where the grid shows B − A, a framed cell is a
head whose gate differs, and orange means less in B."""

_KEYS = """Choose a head in the grid, by pointer or by arrow keys, Home and End."""

_MAPS = """In a picture rows are queries (from the top) and columns are keys (from the left). A
map’s pixel shows the largest value that it stands for, a mask’s the share of its pairs that is
visible."""

_SCRIPTS = ("theme.js", "sort.js", "explorer.js")


def build_page(
    plan: MaskPlan,
    results: Results | None = None,
    *,
    compare: MaskPlan | None = None,
    names: tuple[str, str] = ("the plan", "the compared plan"),
) -> str:
    """Return the report on a plan and on what was measured with it.

    The page loads nothing from elsewhere. Its pictures shrink with the number of heads, so that it
    stays below 8 MiB for 1,024 heads, in one plan or in each of two; see `picture_side`.

    Args:
        plan: A calibrated plan with previews.
        results: What was measured; without it the page has no quality and speed tables, and names
            the machine that built it.
        compare: A second plan with as many heads, whose maps, masks and figures stand beside the
            first's.
        names: What to call the two plans.

    Returns:
        A whole HTML document. All text from the plans, their names and the results is escaped.

    Raises:
        ValueError: The two plans have different layers or heads.
    """
    plans = [plan]
    if compare is not None:
        check_comparable(plan, compare)
        plans.append(compare)
    in_page = shown(plans, names[: len(plans)])
    model = results.model if results else str(plan.fingerprint.get("architecture", "a model"))
    parts = [
        _header(model, results),
        _summary(in_page),
        _measured(results),
        _explorer(in_page),
        _settings(in_page, results),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>dynmask report: {escape(model)}</title><style>{_read('page.css')}</style>"
        f"<script>{''.join(map(_read, _SCRIPTS))}</script></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _header(model: str, results: Results | None) -> str:
    host = results.machine if results else machine()
    found = results.versions if results else versions()
    date = results.date if results else datetime.now(UTC).isoformat(timespec="seconds")
    computer = f"{host.get('processor', 'unknown')}, {host.get('threads', '?')} threads"
    if host.get("gpus"):
        computer += ", " + ", ".join(str(name) for name in host["gpus"])
    packages = ", ".join(f"{name} {version}" for name, version in found.items())
    return (
        '<header><div class="bar"><p class="kicker">dynmask report</p>'
        '<button type="button" id="theme" hidden>Dark colours</button></div>'
        f"<h1>Dynamic attention masks of {escape(model)}</h1>"
        f'<p class="origin">{escape(date)}<br>{escape(computer)}<br>{escape(packages)}</p>'
        "</header>"
    )


def _summary(plans: Sequence[Shown]) -> str:
    def mean(field: str) -> str:
        values = [sum(getattr(v, field) for v in p.views) / len(p.views) for p in plans]
        return _arrow(map(percent, values)) + "\u00a0%"

    heads, layers = len(plans[0].views), len(plans[0].plan.layers)
    gated = _arrow(str(sum(view.gated for view in each.views)) for each in plans)
    figures = [
        (f"{layers} × {heads // layers}", "layers × heads"),
        (f"{gated} of {heads}", "heads that the gate does not keep static"),
        (mean("coverage"), "mean coverage"),
        (mean("density"), "static density, capture length"),
        (mean("density_long"), f"static density, {number(LONG_LENGTH, 0)} tokens"),
    ]
    items = "".join(f"<li><b>{value}</b> <span>{words}</span></li>" for value, words in figures)
    return f'<ul class="summary">{items}</ul>'


def _arrow(values: Iterable[str]) -> str:
    return " → ".join(dict.fromkeys(values))


def _measured(results: Results | None) -> str:
    parts = []
    if results and results.quality:
        parts.append(
            '<section id="quality"><h2>Quality</h2>'
            f"<p>{_QUALITY}</p>"
            f"{quality_table(results.quality)}{quality_charts(results.quality)}"
            '<p class="legend"><span class="swatch score"></span> score, with its interval '
            '<span class="swatch density"></span> density</p></section>'
        )
    if results and results.speed:
        parts.append(
            '<section id="speed"><h2>Speed</h2>'
            f"<p>{_SPEED}</p>"
            f"{speed_table(results.speed)}</section>"
        )
    return "".join(parts)


def _explorer(plans: Sequence[Shown]) -> str:
    ends = " to ".join(map(percent, coverage_range(plans[0].views)))
    words = _COVERAGE.format(
        rows=_each(plans, _measured_rows),
        target=_each(plans, lambda each: f"{percent(each.plan.settings.coverage, 0)}\u00a0%"),
    )
    compared = _comparison(*plans) if len(plans) > 1 else ""
    return (
        f'<section id="explorer"><h2>Heads</h2><p>{words}</p>{compared}'
        f'<p class="scripted">{_KEYS}</p>{controls(plans)}'
        f'<div class="explorer"><div class="map">{grid(plans[0].views)}'
        '<p class="legend"><span class="swatch static"></span> <span id="unframed">static</span> '
        '<span class="swatch gated"></span> <span id="framed">gated</span> '
        '<span class="ramp coverage"></span> '
        f'<span id="range">{ends}\u00a0%</span>'
        "</p></div>"
        f"{panel(plans)}</div>"
        f"<p>{_MAPS}</p>"
        '<p class="legend"><span class="ramp map"></span> map, low to high '
        '<span class="swatch hidden"></span> hidden '
        '<span class="ramp mask"></span> few to all pairs visible</p>'
        f"{data_block(plans)}</section>"
        f'<section id="figures"><h2>All heads</h2>{heads_table(plans)}{sheets(plans)}</section>'
    )


def _each(plans: Sequence[Shown], words: Callable[[Shown], str]) -> str:
    """Return what is said of all plans, or of each by its mark where that differs."""
    said = [words(each) for each in plans]
    if len(set(said)) == 1:
        return said[0]
    return "; ".join(f"{each.mark}: {one}" for each, one in zip(plans, said, strict=True))


def _measured_rows(each: Shown) -> str:
    captured, measured = each.length, each.plan.data["holdout_length"]
    if measured <= captured:
        # As `dynmask.dam.Coverage` says: nothing longer was held out.
        return f"the second half of texts of {number(measured, 0)} tokens"
    return f"the rows past the first {number(captured, 0)} tokens of texts of {number(measured, 0)}"


def _comparison(first: Shown, second: Shown) -> str:
    fewer, more = changes(first.views, second.views)
    words = _COMPARED.format(
        names=(escape(first.name), escape(second.name)), more=more, fewer=fewer
    )
    if first.plan.fingerprint != second.plan.fingerprint:
        words += " <strong>They were made for different models.</strong>"
    if first.plan.data != second.plan.data:
        words += " <strong>They were calibrated on different windows of text.</strong>"
    return f"<p>{words}</p>"


def _settings(plans: Sequence[Shown], results: Results | None) -> str:
    tasks = ""
    if results and results.quality:
        first = {row.task: row.settings for row in reversed(results.quality)}
        tasks = "".join(
            f"<h3>Task: {escape(task)}</h3>{definitions(first[task])}" for task in reversed(first)
        )
    host = f"<h3>Machine</h3>{definitions(results.machine)}" if results else ""
    return (
        '<section id="settings"><h2>Settings</h2>'
        f"{''.join(map(_made, plans))}{tasks}{host}</section>"
    )


def _made(each: Shown) -> str:
    plan, of = each.plan, f" of {each.mark}" if each.mark else ""
    # The sampled weights identify the model to `accelerate`; a reader learns nothing from them.
    model = {name: value for name, value in plan.fingerprint.items() if name != "weights"}
    made = {"created": plan.created, "dynmask": plan.dynmask_version, **plan.data}
    return (
        f"<h3>Calibration{of}</h3>{definitions(plan.settings.to_dict())}"
        f"<h3>Plan and calibration data{of}</h3>{definitions(made)}"
        f"<h3>Model{of}</h3>{definitions(model)}"
    )


def _read(name: str) -> str:
    return resources.files("dynmask.report").joinpath(name).read_text(encoding="utf-8")
