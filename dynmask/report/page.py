"""One self-contained HTML page: opens from the disk, loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING

from dynmask.report.charts import quality_charts
from dynmask.report.heads import LONG_LENGTH, HeadView, head_views, overview, panels
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
its columns and offsets keep, on average over {rows}. The gate compares it with the target of
{target}&nbsp;%: a framed cell is a head that the gate runs dense. Rows are layers, columns are
heads. Choose a cell to see its maps."""

_MAPS = """The first {length} tokens: rows are queries (from the top), columns are keys (from the
left). Each pixel shows the largest value it stands for. A mask’s visible pairs are blue."""


def build_page(plan: MaskPlan, results: Results | None = None) -> str:
    """Return the report on a plan and on what was measured with it.

    Args:
        plan: A calibrated plan with previews.
        results: What was measured; without it the page has no quality and speed tables, and names
            the machine that built it.

    Returns:
        A whole HTML document. All text from the plan and the results is escaped.
    """
    views = head_views(plan)
    model = results.model if results else str(plan.fingerprint.get("architecture", "a model"))
    parts = [
        _header(model, results),
        _summary(views),
        _measured(results),
        _overview(views, plan),
        _heads(views, plan.settings.capture_length),
        _settings(plan, results),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<link rel="icon" href="data:,">'
        f"<title>dynmask report: {escape(model)}</title><style>{_read('page.css')}</style></head>"
        f"<body><main>{''.join(parts)}</main><script>{_read('page.js')}</script></body></html>\n"
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
        '<header><p class="kicker">dynmask report</p>'
        f"<h1>Dynamic attention masks of {escape(model)}</h1>"
        f'<p class="origin">{escape(date)}<br>{escape(computer)}<br>{escape(packages)}</p>'
        "</header>"
    )


def _summary(views: Sequence[HeadView]) -> str:
    dense = sum(view.dense for view in views)
    layers = len({view.layer for view in views})

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    figures = [
        (f"{layers} × {len(views) // layers}", "layers × heads"),
        (f"{dense} of {len(views)}", "heads that the gate does not keep static"),
        (f"{percent(mean([v.coverage for v in views]))} %", "mean coverage"),
        (f"{percent(mean([v.density for v in views]))} %", "static density, capture length"),
        (
            f"{percent(mean([v.density_long for v in views]))} %",
            f"static density, {number(LONG_LENGTH, 0)} tokens",
        ),
    ]
    items = "".join(f"<li><b>{value}</b> <span>{words}</span></li>" for value, words in figures)
    return f'<ul class="summary">{items}</ul>'


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


def _overview(views: Sequence[HeadView], plan: MaskPlan) -> str:
    captured, measured = plan.settings.capture_length, plan.data["holdout_length"]
    rows = f"the rows past the first {number(captured, 0)} tokens of texts of {number(measured, 0)}"
    if measured <= captured:
        # As `dynmask.dam.Coverage` says: nothing longer was held out.
        rows = f"the second half of texts of {number(measured, 0)} tokens"
    words = _COVERAGE.format(target=percent(plan.settings.coverage, 0), rows=rows)
    return (
        '<section id="overview"><h2>Heads</h2>'
        f"<p>{words}</p>{overview(views)}"
        '<p class="legend"><span class="swatch static"></span> static '
        '<span class="swatch dense"></span> dense <span class="ramp coverage"></span> '
        "coverage 0 to 100\u00a0%</p></section>"
    )


def _heads(views: Sequence[HeadView], length: int) -> str:
    layers = "".join(f"<option>{layer}</option>" for layer in dict.fromkeys(v.layer for v in views))
    return (
        '<section id="maps"><h2>Maps and masks</h2>'
        f"<p>{_MAPS.format(length=number(length, 0))}</p>"
        '<p class="legend"><span class="ramp map"></span> map, low to high '
        '<span class="swatch visible"></span> visible <span class="swatch hidden"></span> hidden'
        "</p>"
        '<form class="controls" hidden>'
        f'<label>Layer <select id="choose-layer">{layers}</select></label>'
        '<label>Head <select id="choose-head"></select></label>'
        '<button type="button" id="previous">Previous</button>'
        '<button type="button" id="next">Next</button></form>'
        f"{panels(views)}</section>"
    )


def _settings(plan: MaskPlan, results: Results | None) -> str:
    tasks = ""
    if results and results.quality:
        first = {row.task: row.settings for row in reversed(results.quality)}
        tasks = "".join(
            f"<h3>Task: {escape(task)}</h3>{definitions(first[task])}" for task in reversed(first)
        )
    # The sampled weights identify the model to `accelerate`; a reader learns nothing from them.
    model = {name: value for name, value in plan.fingerprint.items() if name != "weights"}
    made = {"created": plan.created, "dynmask": plan.dynmask_version, **plan.data}
    host = f"<h3>Machine</h3>{definitions(results.machine)}" if results else ""
    return (
        '<section id="settings"><h2>Settings</h2>'
        f"<h3>Calibration</h3>{definitions(plan.settings.to_dict())}"
        f"<h3>Plan and calibration data</h3>{definitions(made)}"
        f"<h3>Model</h3>{definitions(model)}{tasks}{host}</section>"
    )


def _read(name: str) -> str:
    return resources.files("dynmask.report").joinpath(name).read_text(encoding="utf-8")
