"""Pictures of what scores pick: kept keys row by row, types and positions, how long keys live."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

Row = dict[str, Any]
KEPT, SOFT, LINES = "#2f6fd6", "#59636e", ("#7fb2f0", "#2f6fd6", "#173f86")


@contextmanager
def svg(width: float, height: float, rows: int, columns: int) -> Iterator[tuple[Any, Any, list]]:
    """A figure with panels; its SVG is appended to the list, the same for the same figures."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.hashsalt": "dynmask",
        "svg.fonttype": "path",
        "font.size": 8,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        made: list[str] = []
        yield figure, figure.subplots(rows, columns, squeeze=False), made
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white", dpi=144)
        made.append("\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n")


def draw(found: Sequence[Row], expiry: Sequence[Any]) -> dict[str, str]:
    """All pictures of a model, SVG by file name.

    Args:
        found: what `picks.when_keep_changes` returned.
        expiry: ``[layers][G][N]``, the row that evicts each key in one window.
    """
    own = found[1]
    return {
        "masks.svg": masks(expiry, own["keep"]),
        "types.svg": shares(own),
        "lives.svg": lives(found),
    }


def masks(expiry: Sequence[Any], keep: int) -> str:
    """The kept keys of every row, a panel for each layer and kv head."""
    table = np.array(expiry)
    layers, heads, length = table.shape
    # No picture shows more than some hundred rows.
    key = np.arange(0, length, max(1, length // 512))
    row = key[:, None]
    with svg(2.1 * layers + 0.5, 2.1 * heads + 0.6, heads, layers) as (_, panels, made):
        for layer in range(layers):
            for head in range(heads):
                seen = (key <= row) & (row < table[layer, head][key])
                shade = np.where(seen, 2, np.where(key <= row, 1, 0))
                axes = panels[head][layer]
                axes.imshow(
                    shade,
                    cmap=_three(),
                    vmin=0,
                    vmax=2,
                    interpolation="nearest",
                    extent=(0, length, length, 0),
                )
                axes.axhline(keep, color=SOFT, lw=0.5, ls=":")
                axes.set_title(f"layer {layer}, kv head {head}", loc="left")
                axes.set_xticks([0, length // 2, length])
                axes.set_yticks([0, length // 2, length])
                axes.tick_params(labelsize=7, length=2)
                if head == heads - 1:
                    axes.set_xlabel("key")
                if layer == 0:
                    axes.set_ylabel("row")
    return made[0]


def _three() -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap(["#ffffff", "#e9edf2", KEPT])


def shares(own: Row) -> str:
    """Kept pairs by type and by position over what chance would keep, by layer and kv head."""
    named = {**own["types"], **_positions(own)}
    shown = {name: part for name, part in named.items() if part["causal"] > 0}
    types = sum(part["causal"] > 0 for part in own["types"].values())
    heads = [
        (layer, head)
        for layer, row in enumerate(next(iter(shown.values()))["kept"])
        for head in range(len(row))
    ]
    ratio = np.array(
        [[part["kept"][at][head] / part["causal"] for at, head in heads] for part in shown.values()]
    )
    with svg(0.55 * len(heads) + 3, 0.3 * len(shown) + 0.9, 1, 1) as (figure, panels, made):
        axes = panels[0][0]
        shade = np.log2(ratio.clip(2**-3, 2**3))
        image = axes.imshow(shade, cmap="RdBu", vmin=-3, vmax=3, aspect="auto")
        for (y, x), value in np.ndenumerate(ratio):
            said = f"{value:.2f}" if value < 9.95 else f"{value:.0f}"
            colour = "white" if abs(shade[y, x]) > 1.8 else "black"
            axes.text(x, y, said, ha="center", va="center", fontsize=7, color=colour)
        axes.axhline(types - 0.5, color="white", lw=4)
        axes.set_yticks(
            range(len(shown)),
            [f"{name} ({100 * part['causal']:.0f} %)" for name, part in shown.items()],
        )
        axes.set_xticks(range(len(heads)), [f"{layer}.{head}" for layer, head in heads])
        axes.set_xlabel("layer.kv head")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, shrink=0.9)
        bar.set_ticks([-3, -1, 0, 1, 3], labels=["1/8", "1/2", "1", "2", "8"])
        bar.set_label("kept over chance")
    return made[0]


def _positions(own: Row) -> Row:
    said = {"first": f"first {own['first']}", "last": f"last {own['last']}"}
    return {said.get(name, name): part for name, part in own["places"].items()}


def lives(found: Sequence[Row]) -> str:
    """Rows that see an admitted key: the middle half and the 10 % to 90 % range, by keep."""
    layers, heads = len(found[0]["lives"]), len(found[0]["lives"][0])
    with svg(7.2, 2.4, 1, len(found)) as (_, panels, made):
        for axes, row, colour in zip(panels[0], found, LINES, strict=True):
            places: list[int] = []
            names: list[str] = []
            for layer in range(layers):
                for head in range(heads):
                    at = len(places)
                    places.append(at)
                    names.append(f"{layer}.{head}")
                    points = row["lives"][layer][head]
                    if points is None:
                        continue
                    axes.plot([at, at], [points[0], points[4]], color=colour, lw=1)
                    axes.plot([at, at], [points[1], points[3]], color=colour, lw=5)
                    axes.plot([at - 0.3, at + 0.3], [points[2]] * 2, color="black", lw=1)
            axes.axhline(row["keep"], color=SOFT, lw=0.7, ls=":")
            axes.set_ylim(0, row["length"])
            axes.set_yticks([row["length"] * n // 4 for n in range(5)])
            axes.set_xticks(places, names)
            axes.set_xlabel("layer.kv head")
            axes.set_title(f"w = {row['keep']}", loc="left")
        panels[0][0].set_ylabel("rows that see a key")
    return made[0]
