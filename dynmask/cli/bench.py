"""``dynmask bench``: how fast the engine is, against the fastest dense kernel of the machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynmask.cli import FAILED, OK, add_common
from dynmask.cli.console import Output
from dynmask.cli.inputs import check_writable, write_text

_LINES = {
    "op": "forward: selection, schedule and attention, each and together",
    "select": "the exact causal top-w alone",
    "decode": "one query row, from a bounded cache and from the whole context",
    "backward": "gradients of q, k, v and bias, with peak memory",
    "table2": "the DMA paper's kernel table, against SDPA with a dense mask",
}
#: Columns of the printed table, by benchmark; every table fits 80 columns.
_COLUMNS = {
    "op": ["density", "dense\nms", "total\nms", "ratio", "attention\nms", "TFLOP/s", "prepare"],
    "select": ["density", "ms", "Mkeys/s", "peak\nMiB", "schedule\nMiB"],
    "decode": ["step\nms", "graph\nms", "GB/s", "of copy", "dense\nms", "ratio"],
    "backward": ["density", "dense\nms", "ours\nms", "ratio", "TFLOP/s", "memory"],
    "table2": ["ours\nms", "sdpa\nms", "ratio", "ratio\ngraphs", "peer", "paper"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand for each benchmark, and `page`."""
    commands = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, line in _LINES.items():
        one = commands.add_parser(name, help=line, description=line[0].upper() + line[1:] + ".")
        _add_settings(one)
        add_common(one, default=argparse.SUPPRESS)
    line = "make a Markdown page with plots from files of results"
    page = commands.add_parser("page", help=line, description=line[0].upper() + line[1:] + ".")
    page.add_argument("--results", nargs="+", required=True, metavar="FILE.json")
    page.add_argument("--out", required=True, metavar="FOLDER", help="gets README.md and plots")
    add_common(page, default=argparse.SUPPRESS)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FILE.json", help="write the results, after every length")
    parser.add_argument("--quick", action="store_true", help="two lengths and few rounds")
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="TOKENS", help="default: those of the targets"
    )
    parser.add_argument(
        "--scores",
        nargs="+",
        metavar="KIND",
        help="kinds of scores: normal, local, recent, rising, dma (benchmarks/README.md)",
    )
    parser.add_argument("--keep", type=int, help="keys that a row keeps; default 2048")
    parser.add_argument("--batch", type=int, help="default 1; decode's bounded cache 64")
    parser.add_argument("--heads", type=int, help="query heads; default 32, table2 2")
    parser.add_argument("--groups", type=int, help="key heads; default 8, table2 1")
    parser.add_argument("--dim", type=int, help="head size; default 128")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, help="timed calls of each run; default 20")
    parser.add_argument("--warmups", type=int, help="calls before them; default 5")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="the rounds of one run may cost this much, or there are fewer, at least 3; default 6",
    )
    parser.add_argument("--impl", help="backend; default auto")
    parser.add_argument("--seed", type=int, help="default 0")
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="default auto; a CPU gets tiny sizes, which test the benchmark and measure nothing",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Measure, print, and write; 1 if a result was wrong or a computation broke."""
    if arguments.benchmark == "page":
        return _page(arguments, output)
    import torch

    from dynmask.bench import run_benchmark, settings_for
    from dynmask.bench.results import failures

    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    changed = {
        name: getattr(arguments, name)
        for name in ("keep", "batch", "heads", "groups", "dim", "dtype", "rounds", "warmups")
    }
    changed |= {name: getattr(arguments, name) for name in ("budget", "impl", "seed")}
    changed |= {
        name: tuple(value) if (value := getattr(arguments, name)) else None
        for name in ("lengths", "scores")
    }
    settings = settings_for(arguments.benchmark, device=device, quick=arguments.quick, **changed)
    target = check_writable(arguments.out) if arguments.out else None
    lengths = len(settings.lengths)
    with output.progress(settings.benchmark) as progress:
        progress(0, lengths, f"{min(settings.lengths):,} tokens")

        def on_cells(document: dict[str, Any], cells: list[dict[str, Any]]) -> None:
            if target:
                write_text(target, dumps(document))
            done = len({cell["length"] for cell in document["cells"]})
            progress(done, lengths, f"{cells[0]['length']:,} tokens done")

        document = run_benchmark(settings, on_cells=on_cells)
    print_document(output, document)
    wrong = failures(document)
    for line in wrong:
        output.say(f"ERROR {line}", style="bold red")
    output.finish(document)
    return FAILED if wrong else OK


def _page(arguments: argparse.Namespace, output: Output) -> int:
    from dynmask.bench.page import build_page
    from dynmask.bench.results import load

    documents = [load(Path(path)) for path in arguments.results]
    folder = check_writable(Path(arguments.out) / "README.md").parent
    files = build_page(documents)
    for name, content in files.items():
        write_text(folder / name, content)
    output.say(f"Wrote {folder / 'README.md'} and {len(files) - 1} plots.")
    output.finish({"page": str(folder / "README.md"), "files": sorted(files)})
    return OK


def dumps(document: Mapping[str, Any]) -> str:
    """Return the document as the text of a file."""
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def print_document(output: Output, document: Mapping[str, Any]) -> None:
    """Print where the figures come from and a row for each cell."""
    device, settings = document["device"], document["settings"]
    output.say(f"{document['benchmark']} on {device['name']}, backend {document['impl']}")
    output.say(
        f"{settings['dtype']}, {settings['heads']} heads on {settings['groups']}, D "
        f"{settings['dim']}, keep {settings['keep']}; medians of up to {settings['rounds']} rounds",
        style="dim",
    )
    columns = _COLUMNS[document["benchmark"]]
    rows = []
    for cell in document["cells"]:
        row = [f"{cell['length']:,}", _kind(cell)]
        if cell["status"] != "ok":
            rows.append([*row, "error", *[""] * (len(columns) - 1)])
        else:
            rows.append([*row, *_ROWS[document["benchmark"]](cell, document)])
    output.table("", ["tokens", "score", *columns], rows, left=2)
    if device["type"] == "cpu":
        output.say("On a CPU: this shows that the benchmark runs, nothing else.", style="dim")


def _kind(cell: Mapping[str, Any]) -> str:
    words = [cell.get("call"), (cell.get("cache") or "")[:5], cell["score"]]
    return " ".join(word for word in words if word)


def _op(cell: Mapping[str, Any], document: Mapping[str, Any]) -> list[str]:
    return [
        _percent(cell["density"]),
        _fastest(cell.get("dense")),
        _ms(cell["times"]["total"]),
        _ratio(cell.get("ratio")),
        _ms(cell["times"]["attention"]),
        f"{cell['useful_flops'] / 1e12:.1f}",
        _percent(cell["share_before_attention"]),
    ]


def _select(cell: Mapping[str, Any], document: Mapping[str, Any]) -> list[str]:
    peak = cell["peak_bytes"]
    return [
        _percent(cell["density"]),
        _ms(cell["times"]["selection"]),
        f"{cell['keys_per_second'] / 1e6:.1f}",
        f"{peak / 2**20:,.0f}" if peak is not None else "",
        f"{cell['schedule_bytes'] / 2**20:,.0f}" if cell["schedule_bytes"] else "",
    ]


def _decode(cell: Mapping[str, Any], document: Mapping[str, Any]) -> list[str]:
    return [
        _ms(cell["times"]["step"]),
        _ms(cell["times"].get("graph")),
        f"{cell['bytes_per_second'] / 1e9:,.0f}",
        _percent(cell["bytes_per_second"] / document["ceilings"]["copy"]),
        _fastest(cell.get("dense")),
        _ratio(cell.get("ratio")),
    ]


def _backward(cell: Mapping[str, Any], document: Mapping[str, Any]) -> list[str]:
    over = cell["peak_over_flash"]
    return [
        _percent(cell["density"]),
        _fastest(cell.get("dense")),
        _ms(cell["times"]["backward"]),
        _ratio(cell.get("ratio")),
        f"{cell['useful_flops'] / 1e12:.1f}",
        f"{over:.2f}x" if over else "",
    ]


def _table2(cell: Mapping[str, Any], document: Mapping[str, Any]) -> list[str]:
    fastest = cell.get("fastest_step")
    return [
        _ms(cell["times"]["ours step"]),
        _ms(cell["times"].get(f"sdpa {fastest} step")),
        _ratio(cell.get("ratio_step")),
        _ratio(cell.get("ratio_graph")),
        _ratio(cell.get("peer_step")),
        f"{cell['paper']}x" if cell["paper"] else "",
    ]


_ROWS = {
    "op": _op,
    "select": _select,
    "decode": _decode,
    "backward": _backward,
    "table2": _table2,
}


def _ms(time: Mapping[str, Any] | None) -> str:
    return f"{1e3 * time['median']:.4g}" if time else ""


def _fastest(dense: Mapping[str, Any] | None) -> str:
    return _ms(dense["times"][dense["fastest"]]) if dense and dense["fastest"] else ""


def _ratio(ratio: Mapping[str, float] | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio['median']:.2f}x" + (" −" if ratio["median"] < 1 else "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
