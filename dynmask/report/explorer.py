"""The explorer: a grid of heads, the chosen head, and the sheets from which it is cut.

Without JavaScript the grid links to the rows of the heads' table, and the sheets stand open.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynmask.report.heads import LONG_LENGTH, HeadView, head_views
from dynmask.report.html import escape, number, percent, scroll
from dynmask.report.pictures import ACROSS, EXTENSION, GAP, KINDS, picture_side, sheet

if TYPE_CHECKING:
    from dynmask.dam import MaskPlan

#: What the script says of a head: words, a field of `HeadView`, and whether it is a share.
FIGURES = (
    ("coverage", "coverage", True),
    ("coverage, worst tenth of the rows", "tail_coverage", True),
    ("coverage inside the corner", "corner_coverage", True),
    ("columns", "columns", False),
    ("offsets", "offsets", False),
    ("static density at the capture length", "density", True),
    (f"static density at {number(LONG_LENGTH, 0)} tokens", "density_long", True),
)
#: Those by which the grid can be coloured.
COLOURED = (0, 1, 5, 6)


@dataclass(frozen=True)
class Shown:
    """A plan in the page.

    Attributes:
        plan: The plan.
        mark: A or B where two plans are compared, else empty.
        name: What the user calls it; not escaped.
        views: `head_views` of it.
        side: Side of a head's picture, in pixels.
    """

    plan: MaskPlan
    mark: str
    name: str
    views: Sequence[HeadView]
    side: int

    @property
    def length(self) -> int:
        """The capture length, in tokens."""
        return self.plan.settings.capture_length


def shown(plans: Sequence[MaskPlan], names: Sequence[str]) -> list[Shown]:
    """Collect what the page shows of one plan, or of two that are compared."""
    views = [head_views(plan) for plan in plans]
    heads = sum(map(len, views))
    marks = ("A", "B") if len(plans) > 1 else ("",)
    return [
        Shown(plan, mark, name, of_plan, picture_side(heads, plan.settings.capture_length))
        for plan, mark, name, of_plan in zip(plans, marks, names, views, strict=True)
    ]


def grid(views: Sequence[HeadView]) -> str:
    """Return the grid layers x heads: coverage as figure and colour, gated heads framed.

    Colours go from the smallest to the largest coverage.
    """
    low, high = coverage_range(views)
    layers = {view.layer: [v for v in views if v.layer == view.layer] for view in views}
    heads = len(next(iter(layers.values())))
    rows = ""
    for layer, members in layers.items():
        cells = "".join(_cell(view, low, high) for view in members)
        rows += f'<tr><th scope="row">{layer}</th>{cells}</tr>'
    head = "".join(f'<th scope="col">{index}</th>' for index in range(heads))
    table = (
        f'<table class="grid{" many" if heads > 12 else ""}">'
        '<caption class="unseen">Heads: rows are layers, columns are heads</caption>'
        f'<thead><tr><th scope="col"><span class="unseen">Layer</span></th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )
    return scroll("Grid of heads", table, tall=True)


def coverage_range(views: Sequence[HeadView]) -> tuple[float, float]:
    """Return the smallest and the largest coverage."""
    return min(view.coverage for view in views), max(view.coverage for view in views)


def _cell(view: HeadView, low: float, high: float) -> str:
    share = (view.coverage - low) / (high - low) if high > low else 1.0
    words = f"Layer {view.layer}, head {view.head}: coverage {percent(view.coverage)} %"
    return (
        f'<td><a href="#{view.row}" class="cell {view.gate}" '
        f'style="--share:{100 * share:.1f}%" aria-label="{words}, {view.gate}">'
        f"{percent(view.coverage, 0)}</a></td>"
    )


def controls(plans: Sequence[Shown]) -> str:
    """Return the lists and buttons with which a head is picked and the grid coloured."""
    layers = "".join(f"<option>{layer}</option>" for layer in plans[0].plan.layers)
    heads = "".join(
        f"<option>{head}</option>"
        for head in range(len(plans[0].views) // len(plans[0].plan.layers))
    )
    kinds = [(str(index), plan.mark) for index, plan in enumerate(plans)]
    if len(plans) > 1:
        kinds.append(("change", "B − A"))
    values = "".join(
        f'<option value="{kind}:{figure}">{" ".join([mark, FIGURES[figure][0]]).strip()}</option>'
        for kind, mark in kinds
        for figure in COLOURED
    )
    return (
        '<form class="controls" hidden>'
        f'<label>Layer <select id="choose-layer">{layers}</select></label>'
        f'<label>Head <select id="choose-head">{heads}</select></label>'
        '<button type="button" id="previous">Previous head</button>'
        '<button type="button" id="next">Next head</button>'
        f'<label>Colour by <select id="choose-figure">{values}</select></label></form>'
    )


def panel(plans: Sequence[Shown]) -> str:
    """Return the empty panel of the chosen head; the script fills it."""
    parts = []
    for index, each in enumerate(plans):
        name = f"<h4>{each.mark}: {escape(each.name)}</h4>" if each.mark else ""
        figures = "".join(
            f'<figure><canvas width="{each.side}" height="{each.side}" role="img" '
            f'data-kind="{kind}" aria-label="{words}"></canvas>'
            f"<figcaption>{words}<small>{small}</small></figcaption></figure>"
            for kind, (words, small) in enumerate(_captions(each))
        )
        parts.append(
            f'<div class="plan" data-plan="{index}">{name}<p class="why" role="status"></p>'
            f'<div class="pictures">{figures}</div></div>'
        )
    marks = [each.mark or "Value" for each in plans] + (["B − A"] if len(plans) > 1 else [])
    head = "".join(f'<th scope="col">{mark}</th>' for mark in marks)
    rows = "".join(
        f'<tr><th scope="row">{words}{", %" if share else ""}</th>{"<td></td>" * len(marks)}</tr>'
        for words, _, share in FIGURES
    )
    table = (
        '<table class="numbers"><caption class="unseen">Figures of the chosen head</caption>'
        f'<thead><tr><th scope="col">Figure</th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    )
    return (
        f'<div class="panel{" two" if len(plans) > 1 else ""}" id="panel" hidden>'
        '<h3 id="chosen" tabindex="-1"></h3>'
        f'<div class="plans">{"".join(parts)}</div>{scroll("Figures of the head", table)}</div>'
    )


def _captions(each: Shown) -> list[tuple[str, str]]:
    tokens, extended = number(each.length, 0), number(EXTENSION * each.length, 0)
    settings = each.plan.settings
    return [
        ("Mean map", f"{tokens} tokens, log colours"),
        ("True mask", f"amplified map ≥ τ = {settings.tau:g}"),
        ("Stripes", f"columns and offsets, γ ≥ {settings.mu:g}"),
        ("Stripes extended", f"to {extended} tokens"),
    ]


def sheets(plans: Sequence[Shown]) -> str:
    """Return the pictures of all heads, one image for each layer and plan."""
    figures = []
    for index, each in enumerate(plans):
        for layer in each.plan.layers:
            heads = each.plan.layers[layer].heads
            name = f"{each.mark}, layer {layer}" if each.mark else f"Layer {layer}"
            words = f"{name}: {', '.join(KINDS)} of its {heads} heads"
            figures.append(
                f'<figure><img class="sheet" id="sheet-{index}-{layer}" alt="{words}" '
                f'src="{sheet(each.plan, layer, each.side)}">'
                f"<figcaption>{name}<small>heads 0 to {heads - 1}</small></figcaption></figure>"
            )
    return (
        '<details id="sheets" open><summary>All heads at a glance</summary>'
        f"<p>Heads stand side by side, {ACROSS} in a row. Below each other: {', '.join(KINDS)} "
        f"(over {EXTENSION} times the capture length).</p>"
        f'<div class="sheets">{"".join(figures)}</div></details>'
    )


def data_block(plans: Sequence[Shown]) -> str:
    """Return the figures of all heads for the script, as JSON that cannot end its element."""
    first = plans[0]
    data: dict[str, Any] = {
        "layers": list(first.plan.layers),
        "heads": len(first.views) // len(first.plan.layers),
        "figures": [
            {"name": words, "share": share, "byLength": field == "density"}
            for words, field, share in FIGURES
        ],
        "across": ACROSS,
        "kinds": len(KINDS),
        "gap": GAP,
        "plans": [
            {
                "mark": each.mark,
                "side": each.side,
                "length": each.length,
                "target": each.plan.settings.coverage,
                "gated": [int(view.gated) for view in each.views],
                "values": [
                    [round(getattr(view, field), 5) for view in each.views]
                    for _, field, _ in FIGURES
                ],
            }
            for each in plans
        ],
    }
    return f'<script type="application/json" id="data">{json_text(data)}</script>'


def json_text(data: Any) -> str:
    r"""Return JSON for a script element: `<`, `>` and `&` as \u escapes, so no text can end it."""
    text = json.dumps(data, separators=(",", ":"))
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text
