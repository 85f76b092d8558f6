"""The overview grid of all heads, and the panel with the pictures of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from dynmask.report.html import escape, number, percent, scroll
from dynmask.report.pictures import map_picture, mask_picture, pool

if TYPE_CHECKING:
    from dynmask.dam import MaskPlan

#: The second length at which a head's density is given, in tokens.
LONG_LENGTH = 8192


@dataclass(frozen=True)
class Picture:
    """A picture with its caption; `alt` says in words what is drawn."""

    caption: str
    alt: str
    uri: str


@dataclass(frozen=True)
class HeadView:
    """What the page says about one head."""

    layer: int
    head: int
    dense: bool
    coverage: float
    tail_coverage: float
    corner_coverage: float
    columns: int
    offsets: int
    density: float
    density_long: float
    pictures: tuple[Picture, ...]

    @property
    def anchor(self) -> str:
        """Name of the panel in the page."""
        return f"layer-{self.layer}-head-{self.head}"


def head_views(plan: MaskPlan) -> list[HeadView]:
    """Collect the figures and draw the pictures of every head of a plan, layer by layer."""
    length = plan.settings.capture_length
    density = plan.density(length, "static")
    density_long = plan.density(LONG_LENGTH, "static")
    views = []
    for row, (layer, layer_plan) in enumerate(plan.layers.items()):
        # Without the corner: what the columns and offsets alone see.
        alone = dataclasses.replace(plan.stripes(layer, "static"), corner=None)
        stripes_HLL = alone.dense(length)[0]
        views += [
            HeadView(
                layer=layer,
                head=head,
                dense=bool(layer_plan.gate[head]),
                coverage=float(layer_plan.coverage[head]),
                tail_coverage=float(layer_plan.tail_coverage[head]),
                corner_coverage=float(layer_plan.corner_coverage[head]),
                columns=len(layer_plan.columns[head]),
                offsets=len(layer_plan.offsets[head]),
                density=float(density[row, head]),
                density_long=float(density_long[row, head]),
                pictures=_pictures(plan, layer, head, stripes_HLL[head]),
            )
            for head in range(layer_plan.heads)
        ]
    return views


def overview(views: Sequence[HeadView]) -> str:
    """Return the grid layers x heads: coverage as figure and colour, dense heads framed."""
    heads = max(view.head for view in views) + 1
    rows = []
    for layer in dict.fromkeys(view.layer for view in views):
        cells = []
        for view in (v for v in views if v.layer == layer):
            gate = "dense" if view.dense else "static"
            words = (
                f"Layer {layer}, head {view.head}: {percent(view.coverage)} %, "
                f"worst rows {percent(view.tail_coverage)} %, {gate}"
            )
            cells.append(
                f'<td><a href="#{view.anchor}" class="cell {gate}" '
                f'style="--share:{100 * view.coverage:.1f}%" '
                f'title="{words}" aria-label="{words}">{percent(view.coverage, 0)}</a></td>'
            )
        rows.append(f'<tr><th scope="row">{layer}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{index}</th>' for index in range(heads))
    return scroll(
        "Coverage of every head",
        f'<table class="grid"><thead><tr><th><span class="unseen">Layer</span></th>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table>",
    )


def panels(views: Sequence[HeadView]) -> str:
    """Return one section for each head: its figures and its pictures."""
    return "".join(_panel(view) for view in views)


def _panel(view: HeadView) -> str:
    facts = [
        ("gate", "dense" if view.dense else "static"),
        ("coverage", f"{percent(view.coverage)} %"),
        ("coverage, worst tenth", f"{percent(view.tail_coverage)} %"),
        ("coverage inside the corner", f"{percent(view.corner_coverage)} %"),
        ("columns", number(view.columns, 0)),
        ("offsets", number(view.offsets, 0)),
        ("density at capture length", f"{percent(view.density)} %"),
        (f"density at {number(LONG_LENGTH, 0)} tokens", f"{percent(view.density_long)} %"),
    ]
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    figures = "".join(
        f'<figure><img src="{picture.uri}" alt="{escape(picture.alt)}" width="128" height="128">'
        f"<figcaption>{picture.caption}</figcaption></figure>"
        for picture in view.pictures
    )
    return (
        f'<section class="head" id="{view.anchor}" data-layer="{view.layer}" '
        f'data-head="{view.head}" tabindex="-1">'
        f"<h3>Layer {view.layer}, head {view.head}</h3>"
        f'<div class="pictures">{figures}</div><dl class="facts">{items}</dl></section>'
    )


def _pictures(plan: MaskPlan, layer: int, head: int, stripes_LL: Tensor) -> tuple[Picture, ...]:
    layer_plan = plan.layers[layer]
    length = plan.settings.capture_length
    mean, amplified = layer_plan.previews[:, head].float()
    columns, offsets = layer_plan.columns[head], layer_plan.offsets[head]
    where = f"of layer {layer}, head {head}, over the first {length} tokens"
    return (
        Picture(
            f"Mean map <small>log colours, peak {float(mean.max()):.3g}</small>",
            f"Mean attention map {where}, before amplification",
            map_picture(mean, log=True),
        ),
        Picture(
            f"Amplified <small>peak {float(amplified.max()):.3g}, "
            f"τ = {plan.settings.tau:g}</small>",
            f"Mean attention map {where}, after amplification",
            map_picture(amplified, log=False),
        ),
        Picture(
            f"True mask <small>amplified ≥ {plan.settings.tau:g}</small>",
            f"True mask {where}",
            mask_picture(pool(layer_plan.corner[head])),
        ),
        Picture(
            f"Stripes <small>γ ≥ {plan.settings.mu:g}</small>",
            f"Matched stripes {where}: {len(columns)} columns and {len(offsets)} offsets",
            mask_picture(pool(stripes_LL)),
        ),
    )
