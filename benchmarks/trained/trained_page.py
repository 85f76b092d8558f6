"""The page of the trained comparisons, from the kept cells.

python benchmarks/trained/trained_page.py --out docs/results/trained.md
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from grid import Row, shortfall

RESULTS = Path(__file__).parents[1] / "results"
EXPERIMENTS = ("mqar", "scaling", "scaling_again", "past")
NAMES = {
    "mha": "MHA",
    "swa": "SWA",
    "mla": "MLA",
    "nsa": "NSA",
    "dma": "DMA",
    "dma-window": "DMA, 256 nearest",
}

INTRO = """\
# Trained methods

Models that differ in their attention alone, trained from scratch by `dynmask train` on the same
batches: full attention (MHA), a sliding window (SWA), multi-head latent attention (MLA), native
sparse attention (NSA) and dynamic mask attention (DMA). The recipes are those of
`benchmarks/trained`, every figure stands in `benchmarks/results/trained_*.jsonl` with its recipe,
seed, commit, device and time.

The learning rate of a method is the best of those that were tried, at the first seed: by held-out
loss, of other data than the figures; in recall by the accuracy that is shown, mean of the lengths.
What all rates came to stands below each table. Cells that are empty have not been run. Chance
decides among methods whose seeds overlap, and one seed says nothing about that.

DMA's scores had no bound in runs up to commit 200bf05: `exp(A softplus(Wdt v))`. Since then the
tangent takes the place of exp above 148.
"""

MQAR = """\
Rows of key-value pairs, filler with ids of its own, and every key once more, whose value is to be
named; all rows are new, and the arg max is over the whole vocabulary. To name any value of the row
is right once in as many as there are pairs. A model has 2 layers and is trained on rows of 16 to
8,192 tokens. SWA, NSA and DMA read 512 keys a row (NSA compressed ones besides). A query-free
selector such as DMA's can keep all values as long as there are at most 512; beyond, it has to drop
some before it knows which are asked for.

Times are of all methods in turn in one process on a GPU of its own: MHA, SWA
and MLA by transformers with torch's SDPA (SWA's window is a mask to it, whose hidden part it
computes), NSA and DMA on this package's engine, NSA's compressed branch, its top-k over blocks and
its gates in plain torch. *Against MHA* is the ratio of two medians of that process: below 1 is
faster than MHA; in brackets the widest range that the quartiles allow. Where MHA takes as long at
every length, the launches of kernels are what is timed, and not attention. The raw figures name the
runs that were timed; a model that was no longer there is one of the same recipe with initial
weights, which decide only DMA's lists of keys.
"""

SCALING = """\
Running text of books; trained and measured on 4,096 tokens, where SWA, NSA and DMA read 512 keys
a row (NSA compressed ones besides). Parameters differ by less than 1 %. *Against MHA* is the
relative change of the perplexity, window by window on the same text and at the same seed, with a
95 % interval from the scatter of the windows: that of the seeds comes on top. Runs that had another
amount of text than most of their seed are named; a mean over seeds and the choice of a rate take
all as they are.
Attention is torch's SDPA (MHA, SWA, MLA) or this package's engine. Runs whose layers were under
torch.compile are named: it rounds elsewhere.
"""

PAST = """\
Models of the recipes above (where a run was made twice, those of the second), trained on for 1,200
steps on records of lines and needles with questions at up to 4,096 tokens (keys, numbers and books
of the test are others), most of them in rows of 512, then asked at greedy decoding, as
`dynmask eval` does. Nothing else is done for lengths beyond: RoPE's base is 500,000 throughout.
DMA keeps 512 keys a row: in most of its training it had none to drop. Intervals are Wilson's, 95 %.
"""


def page(rows: dict[str, list[Row]]) -> tuple[str, dict[str, str]]:
    """The page's Markdown, and its pictures by name.

    Raises:
        ValueError: there are no finished cells.
    """
    rows = {name: finished(listed) for name, listed in rows.items()}
    if not any(rows.values()):
        raise ValueError("there are no finished cells; run mqar.py, scaling.py or past.py first")
    parts, pictures = [INTRO], {}
    if found := rows.get("mqar"):
        parts += ["## Associative recall\n", MQAR, origin(found), ""]
        timed = {row["part"]: row for row in found if "times" in row}
        found = [row for row in found if "times" not in row]
        for part in dict.fromkeys([*names(found), *timed]):
            parts += [mqar(part, [row for row in found if row["part"] == part])]
            parts += [times(timed[part])] if part in timed else []
    if found := rows.get("scaling"):
        parts += ["## Perplexity by size\n", SCALING, origin(found), ""]
        parts += [scaling(part, [r for r in found if r["part"] == part]) for part in names(found)]
        parts += [repeated(found, rows.get("scaling_again", []))]
    if found := rows.get("past"):
        parts += ["## Past the trained length\n", PAST, origin(found), ""]
        for part in names(found):
            mine = [row for row in found if row["part"] == part]
            pictures[f"trained-past-{part}.svg"] = heatmap(mine)
            parts += [past(part, mine)]
    return "\n".join(parts), pictures


def finished(rows: Iterable[Row]) -> list[Row]:
    """Each cell's last figure, failures left out; runs that diverged are figures."""
    return list({row["key"]: row for row in rows if "failed" not in row}.values())


def names(rows: Sequence[Row], what: str = "part") -> list[Any]:
    """Values in order of their first appearance; methods in the order of the tables."""
    found = list(dict.fromkeys(row[what] for row in rows))
    return [name for name in NAMES if name in found] if what == "method" else found


def origin(rows: Sequence[Row]) -> str:
    """Where figures come from."""

    def all_of(of: Callable[[Row], Any]) -> str:
        return ", ".join(sorted({str(of(row["environment"])) for row in rows}))

    return (
        f"{all_of(lambda e: e['device']['name'])}; torch "
        f"{all_of(lambda e: e['versions']['torch'])}; {all_of(lambda e: e['date'][:10])}; commit "
        f"{all_of(lambda e: e['commit'][:7] + e['commit'][40:])}."
    )


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, with an empty line behind."""
    listed = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in listed) + "\n"


def chosen(rows: Sequence[Row], method: str) -> list[Row]:
    """A method's runs at the rate that is best at its first seed, by seed."""
    mine = [row for row in rows if row["method"] == method and "diverged" not in row]
    if not mine:
        return []
    first = min(row["seed"] for row in mine)
    best = min((r for r in mine if r["seed"] == first), key=shortfall)
    return sorted((r for r in mine if r["lr"] == best["lr"]), key=lambda r: r["seed"])


def seeds_of(rows: Sequence[Row], runs: Sequence[Row]) -> str:
    """How many seeds a mean is of, and how many more diverged at its rate."""
    of = (runs[0]["method"], runs[0]["lr"])
    lost = sum("diverged" in row for row in rows if (row["method"], row["lr"]) == of)
    return f"{len(runs)} ({lost} diverged)" if lost else f"{len(runs)}"


def spread(values: Sequence[float], form: str) -> str:
    """The mean, with the least and the largest where there are several."""
    mean = format(statistics.fmean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({format(min(values), form)} to {format(max(values), form)})"


def rates(rows: Sequence[Row]) -> str:
    """What rates are chosen by, at the first seed of each method."""
    lrs = sorted({row["lr"] for row in rows})
    recall = any("lengths" in row for row in rows)
    lines = []
    for method in names(rows, "method"):
        mine = [row for row in rows if row["method"] == method]
        first = min(row["seed"] for row in mine)
        shown = {row["lr"]: _rate(row) for row in mine if row["seed"] == first}
        lines.append([NAMES[method], *(shown.get(lr, "") for lr in lrs)])
    what = "accuracy at rate, mean of the lengths" if recall else "held-out loss at rate"
    return table([what, *(f"{lr:g}" for lr in lrs)], lines)


def _rate(row: Row) -> str:
    if "diverged" in row:
        return "diverged"
    value = shortfall(row)
    return f"{100 - 100 * value:.1f}" if "lengths" in row else f"{value:.4f}"


def runs_of(rows: Iterable[Row]) -> str:
    """Name some runs of a part."""
    return ", ".join(f"{NAMES[row['method']]} at {row['lr']:g} seed {row['seed']}" for row in rows)


def mqar(part: str, rows: Sequence[Row]) -> str:
    """Accuracy by length."""
    some = next((row for row in rows if "lengths" in row), None)
    head = [f"### {part}\n"]
    if some is None:
        return "\n".join([*head, *([rates(rows)] if rows else [])])
    columns = [
        f"{at['length']:,} tokens, {at['pairs']:,} pairs"
        for at in sorted(some["lengths"], key=lambda at: at["length"])
    ]
    scores = []
    for method in names(rows, "method"):
        runs = chosen(rows, method)
        if not runs:
            continue
        by = [sorted(run["lengths"], key=lambda at: at["length"]) for run in runs]
        scores.append(
            [
                NAMES[method],
                f"{runs[0]['parameters'] / 1e6:.2f}M",
                f"{runs[0]['lr']:g}",
                seeds_of(rows, runs),
                *(
                    spread([100 * at["accuracy"] for at in each], ".1f")
                    for each in zip(*by, strict=True)
                ),
            ]
        )
    cpu = [row for row in rows if row["environment"]["device"]["type"] == "cpu"]
    mixed = f"Trained on a CPU in float32, the others on a GPU in bfloat16: {runs_of(cpu)}.\n"
    return "\n".join(
        [
            *head,
            "Accuracy in %, mean of the seeds (least to largest):\n",
            table(["method", "parameters", "rate", "seeds", *columns], scores),
            rates(rows),
            *([mixed] if 0 < len(cpu) < len(rows) else []),
        ]
    )


def times(row: Row) -> str:
    """Time by length, and against MHA in the same process."""
    each = sorted(row["times"], key=lambda at: at["length"])
    lines = []
    for method in (name for name in NAMES if name in row["runs"]):
        cells = []
        for at in each:
            mine, full = (at["seconds"].get(name) for name in (method, "mha"))
            ratio = f", {_ratio(mine, full)}" if mine and full and method != "mha" else ""
            cells.append(f"{1e3 * mine['median']:.2f}{ratio}" if mine else "")
        lines.append([NAMES[method], *cells])
    tokens = max(at["batch"] * at["length"] for at in each)
    absent = [f"{NAMES[method]} ({why})" for method, why in row["missing"].items()]
    initial = [NAMES[method] for method in row.get("initial", ())]
    return "\n".join(
        [
            f"Milliseconds of a forward pass over {tokens:,} tokens in rows of the length, and "
            "against MHA:\n",
            table(["method", *(f"{at['length']:,} tokens" for at in each)], lines),
            *([f"With initial weights: {', '.join(initial)}.\n"] if initial else []),
            *([f"Not timed: {', '.join(absent)}.\n"] if absent else []),
        ]
    )


def _ratio(mine: Row, full: Row) -> str:
    middle = mine["median"] / full["median"]
    low, high = mine["low"] / full["high"], mine["high"] / full["low"]
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def scaling(part: str, rows: Sequence[Row]) -> str:
    """Perplexity and cost of a size."""
    lines = []
    full = {row["seed"]: row for row in chosen(rows, "mha")}
    for method in names(rows, "method"):
        runs = chosen(rows, method)
        if not runs:
            continue
        pairs = [
            (run["perplexity"]["rows"], full[run["seed"]]["perplexity"]["rows"])
            for run in runs
            if run["seed"] in full and method != "mha"
        ]
        lines.append(
            [
                NAMES[method],
                f"{runs[0]['parameters'] / 1e6:.1f}M",
                f"{runs[0]['lr']:g}",
                seeds_of(rows, runs),
                spread([run["perplexity"]["score"] for run in runs], ".3f"),
                spread([run["perplexity"]["metrics"]["bits_per_byte"] for run in runs], ".4f"),
                against(pairs),
            ]
        )
    if not lines:
        return "\n".join([f"### {part}\n", rates(rows)])
    run = next(row for row in rows if "perplexity" in row)
    head = ["method", "parameters", "rate", "seeds", "perplexity", "bits a byte", "against MHA"]
    compiled = runs_of(row for row in rows if row.get("compiled"))
    what = (
        f"{run['tokens'] / 1e6:.1f}M tokens of training, {epochs(rows)}; "
        f"{run['perplexity']['n']} test windows of {run['perplexity']['settings']['length']:,}. "
        f"Under torch.compile: {compiled or 'none'}."
    )
    return "\n".join([f"### {part}\n", what + "\n", table(head, lines), rates(rows)])


def epochs(rows: Sequence[Row]) -> str:
    """How often the runs of a seed saw their text, and which of them had another amount of it."""
    seeds: dict[int, dict[int, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: (row["seed"], row["method"], row["lr"])):
        if "corpus_tokens" in row:
            seeds.setdefault(row["seed"], {}).setdefault(row["corpus_tokens"], []).append(row)
    said: dict[str, list[int]] = {}
    for seed, amounts in seeds.items():
        (_, most), *others = sorted(amounts.items(), key=lambda each: -len(each[1]))
        text = _amount(most)
        for _, few in others:
            which = ", ".join(f"{NAMES[row['method']]} at {row['lr']:g}" for row in few)
            text += f", but {_amount(few)} for {which}"
        said.setdefault(text, []).append(seed)
    if len(said) == 1:
        return next(iter(said))
    of = {text: f"seed{'s' * (len(s) > 1)} {' and '.join(map(str, s))}" for text, s in said.items()}
    return "; ".join(f"{of[text]}: {text}" for text in said)


def _amount(rows: Sequence[Row]) -> str:
    row = rows[0]
    return f"{row['epochs']:.2f} epochs of {row['corpus_tokens'] / 1e6:.1f}M tokens of books"


def repeated(rows: Sequence[Row], again: Sequence[Row]) -> str:
    """What runs came to that were made twice, to tell how far a figure repeats."""
    first = {row["key"]: row for row in rows}
    pairs = [(first[row["key"]], row) for row in again if row["key"] in first]
    if not pairs:
        return ""

    def shown(row: Row) -> str:
        how = "compiled" if row.get("compiled") else "not compiled"
        return f"{row['perplexity']['score']:.1f} ({how})"

    said = (f"{NAMES[one['method']]} {shown(one)} and {shown(two)}" for one, two in pairs)
    run = pairs[0][0]
    return (
        f"**The same run twice**, recipe, seed {run['seed']} and text alike, at {run['part']}: "
        f"{', '.join(said)}. Rounding differs from run to run, and training makes that large: "
        "differences of this size may be chance, whatever the intervals above say.\n"
    )


def against(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> str:
    """Relative change of the perplexity with its interval, see `change`."""
    if not pairs:
        return ""
    low, value, high = change(pairs)
    return f"{value:+.2%} ({low:+.2%} to {high:+.2%})"


def change(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]],
) -> tuple[float, float, float]:
    """Relative change of the perplexity by the differences of windows, each a mean over seeds.

    Returns:
        The change between the ends of its 95 % interval.
    """
    seeds = [[a - b for a, b in zip(mine, theirs, strict=True)] for mine, theirs in pairs]
    windows = [statistics.fmean(each) for each in zip(*seeds, strict=True)]
    mean = statistics.fmean(windows)
    half = 1.96 * statistics.stdev(windows) / math.sqrt(len(windows)) if len(windows) > 1 else 0.0
    return math.expm1(mean - half), math.expm1(mean), math.expm1(mean + half)


def past(part: str, rows: Sequence[Row]) -> str:
    """Accuracy by length; the picture has it by depth."""
    lengths = sorted({row["length"] for row in rows})
    lines = []
    for task in names(rows, "task"):
        for method in names(rows, "method"):
            cells = []
            for length in lengths:
                mine = pooled(rows, method, task, length)
                cells.append(_share(mine) if mine else "")
            seeds = {r["seed"] for r in rows if (r["method"], r["task"]) == (method, task)}
            lines.append([task, NAMES[method], str(len(seeds)), *cells])
    picture = f"![Accuracy by depth and length, {part}](trained-past-{part}.svg)\n"
    head = ["task", "method", "seeds", *(f"{length:,}" for length in lengths)]
    return "\n".join([f"### {part}, by length\n", table(head, lines), picture])


def pooled(rows: Sequence[Row], method: str, task: str, length: int) -> list[tuple[float, int]]:
    """Depth and mark of all questions of all seeds."""
    return [
        (depth, hit)
        for row in rows
        if (row["method"], row["task"], row["length"]) == (method, task, length)
        for depth, hit in row.get("result", {}).get("marks", ())
    ]


def _share(marks: Sequence[tuple[float, int]]) -> str:
    from dynmask.eval.result import wilson

    hits, n = sum(hit for _, hit in marks), len(marks)
    low, high = wilson(hits, n)
    return f"{100 * hits / n:.0f} ({100 * low:.0f} to {100 * high:.0f})"


def heatmap(rows: Sequence[Row]) -> str:
    """Accuracy by depth and length, a panel for each task and method; empty where not asked."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    tasks, methods = names(rows, "task"), names(rows, "method")
    lengths = sorted({row["length"] for row in rows})
    # A fixed salt and no date: the same figures give the same file.
    with rc_context({"svg.hashsalt": "dynmask", "svg.fonttype": "path"}):
        size = (2.6 * len(methods) + 1, 2.6 * len(tasks))
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(len(tasks), len(methods), squeeze=False)
        for line, task in zip(panels, tasks, strict=True):
            for axes, method in zip(line, methods, strict=True):
                image = axes.imshow(
                    [
                        [_tenth(pooled(rows, method, task, at), tenth) for at in lengths]
                        for tenth in range(10)
                    ],
                    vmin=0,
                    vmax=100,
                    aspect="auto",
                    cmap="viridis",
                )
                axes.set_title(f"{NAMES[method]}, {task}", loc="left", fontsize=9)
                axes.set_xticks(range(len(lengths)), [f"{at / 1024:g}K" for at in lengths])
                axes.set_yticks([-0.5, 4.5, 9.5], ["0", "50", "100"])
                axes.tick_params(labelsize=8)
        panels[0][0].set_ylabel("depth, %", fontsize=8)
        figure.colorbar(image, ax=panels.ravel().tolist(), label="accuracy, %", shrink=0.8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _tenth(marks: Sequence[tuple[float, int]], tenth: int) -> float:
    hits = [hit for depth, hit in marks if min(int(10 * depth), 9) == tenth]
    return 100 * statistics.fmean(hits) if hits else math.nan


def write(rows: dict[str, list[Row]], path: Path) -> None:
    """Write the page and beside it its pictures."""
    save(*page(rows), path)


def save(text: str, pictures: dict[str, str], path: Path) -> None:
    """Write a page and beside it its pictures, by their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    for name, picture in pictures.items():
        path.with_name(name).write_text(picture, encoding="utf-8")


def main() -> None:
    from cells import read_rows

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of trained_*.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = {name: read_rows(args.results / f"trained_{name}.jsonl") for name in EXPERIMENTS}
    try:
        write(rows, args.out)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
