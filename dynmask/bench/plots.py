"""Plots of results as SVG, by matplotlib (extra `report`), which only these functions import."""

from __future__ import annotations

import io
from collections.abc import Mapping
from itertools import cycle
from typing import Any

from dynmask.bench.results import break_even, good

Line = list[tuple[int, float]]

#: The runs whose time is drawn, by benchmark.
_DRAWN = {
    "op": ("total", "attention"),
    "select": ("selection",),
    "decode": ("step", "graph"),
    "backward": ("backward", "both"),
    "table2": (),
}


def times_against_length(document: Mapping[str, Any]) -> str | None:
    """Draw every run's time against the length, both logarithmic, with the break-even points."""
    lines = time_lines(document)
    if not lines:
        return None
    marks = {}
    for kind in document["settings"]["scores"]:
        cells = [c for c in good(document) if c["score"] == kind and "ratio" in c]
        at = break_even([c["length"] for c in cells], [c["ratio"]["median"] for c in cells])
        if at is not None and cells and at > cells[0]["length"]:
            marks[f"break-even, {kind}"] = at
    return _draw(lines, f"{document['benchmark']}: time, s", marks, logarithmic=True)


def rates(document: Mapping[str, Any]) -> str | None:
    """Draw the useful rate against the length, with the device's own rate measured in the run."""
    cells, ceilings = good(document), document["ceilings"]
    lines: dict[str, Line] = {}
    if document["benchmark"] == "decode":
        for cell in cells:
            name = f"{cell['cache']}, {cell['score']}"
            lines.setdefault(name, []).append((cell["length"], cell["bytes_per_second"] / 1e9))
        limit, unit = ceilings["copy"] / 1e9, "GB/s of visible keys and values"
        name = "copy"
    elif document["benchmark"] in ("op", "backward"):
        for cell in cells:
            lines.setdefault(f"ours, {cell['score']}", []).append(
                (cell["length"], cell["useful_flops"] / 1e12)
            )
        for cell in document["cells"]:
            for dense, rate in cell.get("dense", {}).get("flops", {}).items():
                point = (cell["length"], rate / 1e12)
                if point not in lines.setdefault(f"dense, {dense}", []):
                    lines[f"dense, {dense}"].append(point)
        limit, unit = ceilings["matmul"] / 1e12, "useful TFLOP/s"
        name = "matrix product"
    if not lines:
        return None
    lengths = [length for line in lines.values() for length, _ in line]
    lines[name] = [(min(lengths), limit), (max(lengths), limit)]
    return _draw(lines, f"{document['benchmark']}: {unit}", {}, logarithmic=False)


def time_lines(document: Mapping[str, Any]) -> dict[str, Line]:
    """Return the lines of `times_against_length`: name to points of length and seconds."""
    lines: dict[str, Line] = {}

    def add(name: str, length: int, time: Mapping[str, Any]) -> None:
        line = lines.setdefault(name, [])
        if length not in [at for at, _ in line]:  # dense kernels stand in every kind's cell
            line.append((length, time["median"]))

    for cell in document["cells"]:
        where = [str(cell[key]) for key in ("call", "cache", "score") if cell.get(key)]
        for name, time in cell.get("dense", {}).get("times", {}).items():
            add(f"dense, {name}", cell["length"], time)
        for name, time in cell.get("times", {}).items():
            drawn = _DRAWN[document["benchmark"]]
            if name in drawn or (drawn == () and name.endswith("step")):
                add(", ".join([name, *where]), cell["length"], time)
    return lines


def _draw(
    lines: Mapping[str, Line], title: str, marks: Mapping[str, float], *, logarithmic: bool
) -> str:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # A fixed salt and no date: the same figures give the same file.
    with rc_context({"svg.hashsalt": "dynmask", "svg.fonttype": "path"}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for name, line in lines.items():
            baseline = name.startswith(("dense", "sdpa", "copy", "matrix"))
            lengths, values = zip(*sorted(line), strict=True)
            axes.plot(
                lengths, values, "--" if baseline else "-", marker="o", markersize=4, label=name
            )
        for style, (name, at) in zip(cycle((":", "-.", "--")), marks.items(), strict=False):
            label = f"{name}: {at:,.0f}"
            axes.axvline(at, color="black", linewidth=0.8, linestyle=style, label=label)
        axes.set_xscale("log", base=2)
        if logarithmic:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        ticks = sorted({length for line in lines.values() for length, _ in line})
        axes.set_xticks(ticks, [_tokens(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _tokens(length: int) -> str:
    if length % (1 << 20) == 0:
        return f"{length >> 20}M"
    return f"{length >> 10}K" if length % 1024 == 0 else str(length)
