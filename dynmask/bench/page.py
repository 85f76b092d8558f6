"""Results as one Markdown page with plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dynmask.bench.plots import rates, times_against_length
from dynmask.bench.results import break_even, good, name_of

Cell = Mapping[str, Any]

#: What a cell is told by, and the heading of its column.
_KEYS = {"length": "tokens", "call": "call", "cache": "cache", "score": "score"}

_TITLES = {
    "op": "Forward",
    "select": "Selection",
    "decode": "Decode",
    "backward": "Backward",
    "table2": "The DMA paper's kernel table",
}


def build_page(documents: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Make the page.

    Args:
        documents: Loaded results; a benchmark may occur more than once, say on two GPUs.

    Returns:
        File name to content: ``README.md`` and the plots as SVG that it shows.

    Raises:
        ImportError: If matplotlib is missing (extra ``report``).
    """
    files: dict[str, str] = {}
    lines = [
        "# Benchmark results",
        "",
        "Made by `dynmask bench page`. Times are medians, with quartiles in brackets where there",
        "is room; ratios are the fastest dense kernel's time over ours: above 1 ours is faster. A",
        "cell that loses is marked **loses**, one that is wrong or broke **error**. Useful work is",
        "that of the visible pairs, beside it its share of the matrix product below.",
    ]
    for number, document in enumerate(documents):
        name = f"{document['benchmark']}-{number + 1}"
        lines += ["", f"## {_TITLES[document['benchmark']]}: {document['device']['name']}", ""]
        lines += _origin(document)
        table, notes = _TABLES[document["benchmark"]](document)
        lines += ["", *table]
        if notes:
            lines += ["", *notes]
        several = len({cell["length"] for cell in document["cells"]}) > 1
        plots = {"time": times_against_length(document), "rate": rates(document)} if several else {}
        for kind, picture in plots.items():
            if picture is not None:
                files[f"{name}-{kind}.svg"] = picture
                lines += ["", f"![{_TITLES[document['benchmark']]}, {kind}]({name}-{kind}.svg)"]
    files["README.md"] = "\n".join(lines) + "\n"
    return files


def _origin(document: Mapping[str, Any]) -> list[str]:
    settings, device = document["settings"], document["device"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    clocks = next((c["clocks"] for c in document["cells"] if c.get("clocks")), None)
    lines = [
        f"{document['date']}, commit {document['commit'] or 'unknown'}, {versions}; "
        f"backend `{document['impl']}`, {settings['dtype']}, batch {settings['batch']}, "
        f"{settings['heads']} heads, {settings['groups']} kv heads, D {settings['dim']}, "
        f"keep {settings['keep']}, up to {settings['rounds']} rounds."
    ]
    if device["type"] == "cpu":
        lines.append("**On a CPU: this shows that the benchmark runs, not what a kernel does.**")
    if clocks:
        lines.append(
            f"Clocks: SM {clocks['clocks.sm']} of {clocks['clocks.max.sm']}, memory "
            f"{clocks['clocks.mem']}."
        )
    ceilings = document["ceilings"]
    lines.append(
        f"Measured in the same run: copy {ceilings['copy'] / 1e9:,.0f} GB/s (read plus written), "
        f"matrix product {ceilings['matmul'] / 1e12:,.1f} TFLOP/s."
    )
    if not document["complete"]:
        lines.append("**Incomplete: some lengths are missing.**")
    return lines


def _op(document: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    columns = ["density", "dense ms", "total ms", "ratio", "attention ms"]
    columns += ["before attention", "useful TFLOP/s", "dense TFLOP/s"]

    def row(cell: Cell) -> list[str]:
        fast = cell["dense"]["fastest"]
        return [
            _percent(cell["density"]),
            _dense(cell["dense"]["times"], fast),
            _ms(cell["times"]["total"]),
            _ratio(cell.get("ratio")),
            _ms(cell["times"]["attention"]),
            _percent(cell["share_before_attention"]),
            _rate(cell["useful_flops"], document),
            f"{cell['dense']['flops'][fast] / 1e12:,.1f}" if fast else "",
        ]

    return _table(document, columns, row), _break_evens(document)


def _backward(document: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    columns = ["density", "dense ms", "ours ms", "ratio", "schedules made"]
    columns += ["with forward", "memory over flash", "useful TFLOP/s"]

    def row(cell: Cell) -> list[str]:
        over = cell["peak_over_flash"]
        return [
            _percent(cell["density"]),
            _dense(cell["dense"]["times"], cell["dense"]["fastest"]),
            _ms(cell["times"]["backward"]),
            _ratio(cell.get("ratio")),
            _ratio(cell.get("ratio_repeated")),
            _ratio(cell.get("ratio_both")),
            f"{over:.2f}" if over else "",
            _rate(cell["useful_flops"], document),
        ]

    return _table(document, columns, row), _break_evens(document)


def _select(document: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    columns = ["density", "ms", "million keys/s", "peak over the score's bytes"]
    columns += ["schedule MiB"]

    def row(cell: Cell) -> list[str]:
        peak = cell["peak_bytes"]
        return [
            _percent(cell["density"]),
            _ms(cell["times"]["selection"]),
            f"{cell['keys_per_second'] / 1e6:,.1f}",
            f"{peak / cell['score_bytes']:.1f}" if peak is not None else "",
            f"{cell['schedule_bytes'] / 2**20:,.0f}" if cell["schedule_bytes"] else "",
        ]

    return _table(document, columns, row), []


def _decode(document: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    columns = ["step ms", "graph ms", "GB/s", "of copy", "dense ms", "ratio"]

    def row(cell: Cell) -> list[str]:
        graph = cell["times"].get("graph")
        dense = cell.get("dense")
        share = cell["bytes_per_second"] / document["ceilings"]["copy"]
        return [
            _ms(cell["times"]["step"]),
            _ms(graph) if graph else "",
            f"{cell['bytes_per_second'] / 1e9:,.0f}",
            _percent(share),
            _dense(dense["times"], dense["fastest"]) if dense else "",
            _ratio(cell.get("ratio")),
        ]

    notes = []
    for cache in ("bounded", "unbounded"):
        for kind in document["settings"]["scores"]:
            medians = [
                min(time["median"] for time in cell["times"].values())
                for cell in good(document)
                if (cell["cache"], cell["score"]) == (cache, kind)
            ]
            if medians:
                spread = max(medians) / min(medians)
                notes.append(f"- {cache}, {kind}: slowest step over fastest {spread:.3f}")
    notes.append(
        "- A bounded cache has one shape at every context, so its step time is flat by its make."
    )
    return _table(document, columns, row), notes


def _table2(document: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    columns = ["ours ms", "ratio", "ratio, graphs", "fastest SDPA", "peer over ours"]
    columns += ["paper (RTX 4090)"]

    def row(cell: Cell) -> list[str]:
        paper = cell["paper"]
        return [
            _ms(cell["times"]["ours step"]),
            _ratio(cell.get("ratio_step")),
            _ratio(cell.get("ratio_graph")),
            cell.get("fastest_step") or "",
            _ratio(cell.get("peer_step")) or _why_not(cell["failed"].get("peer", "")),
            f"{paper}x" if paper else "",
        ]

    notes = [
        "Ours holds selection, schedule and attention, and for `bounded` one step from a cache of "
        "`keep` slots, the new token taken in; SDPA's dense mask is made beforehand. The paper's "
        "ratios are its kernel's alone, on another GPU."
    ]
    return _table(document, columns, row), notes


_TABLES: dict[str, Callable[[Mapping[str, Any]], tuple[list[str], list[str]]]] = {
    "op": _op,
    "select": _select,
    "decode": _decode,
    "backward": _backward,
    "table2": _table2,
}


def _why_not(error: str) -> str:
    """Say in a word or two why the peer was not timed."""
    if error.startswith("ModuleNotFoundError"):
        return "not installed"
    return "wrong result" if error.startswith("GateError") else error[:40]


def _table(
    document: Mapping[str, Any], columns: list[str], row: Callable[[Cell], list[str]]
) -> list[str]:
    keys = [key for key in _KEYS if any(cell.get(key) for cell in document["cells"])]
    columns = [*(_KEYS[key] for key in keys), *columns]
    lines = [_line(columns), _line(["---"] * len(columns))]
    for cell in document["cells"]:
        first = [f"{cell[k]:,}" if k == "length" else str(cell.get(k) or "") for k in keys]
        if cell["status"] != "ok":
            reason = cell["error"].partition("\n")[0].replace("|", "/")[:160]
            rest = [f"**error** {reason}"]
            rest += [""] * (len(columns) - len(first) - 1)
        else:
            rest = row(cell)
        lines.append(_line([*first, *rest]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _break_evens(document: Mapping[str, Any]) -> list[str]:
    notes = []
    for kind in document["settings"]["scores"]:
        cells = [c for c in good(document) if c["score"] == kind and "ratio" in c]
        at = break_even([c["length"] for c in cells], [c["ratio"]["median"] for c in cells])
        if not cells:
            continue
        if at is None:
            text = f"none up to {cells[-1]['length']:,} tokens"
        elif at == cells[0]["length"]:
            text = f"faster from the shortest length, {cells[0]['length']:,} tokens"
        else:
            text = f"about {at:,.0f} tokens (interpolated)"
        notes.append(f"- break-even, {kind}: {text}")
    failed = {
        f"- no figure for dense {name}: {reason}"
        for cell in document["cells"]
        for name, reason in cell.get("dense", {}).get("failed", {}).items()
    }
    notes += sorted(failed)
    wrong = [c for c in document["cells"] if c["status"] != "ok"]
    return notes + [f"- {name_of(cell)}: not timed" for cell in wrong]


def _ms(time: Mapping[str, Any]) -> str:
    middle, low, high = (1e3 * time[name] for name in ("median", "low", "high"))
    return f"{_short(middle)} [{_short(low)}, {_short(high)}]"


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:,.0f}"


def _dense(times: Mapping[str, Any], fastest: str | None) -> str:
    return f"{_short(1e3 * times[fastest]['median'])} ({fastest})" if fastest else ""


def _ratio(ratio: Mapping[str, float] | None) -> str:
    if ratio is None:
        return ""
    text = f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    return text if ratio["median"] >= 1 else f"{text} **loses**"


def _rate(flops: float, document: Mapping[str, Any]) -> str:
    return f"{flops / 1e12:,.1f} ({_percent(flops / document['ceilings']['matmul'])})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
