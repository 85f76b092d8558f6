"""The page of `mechanism.py`: the rows of its tables, what scores pick, and pictures.

python benchmarks/trained/mechanism_page.py --out docs/results/mechanism.md
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grid import Row
from picks_draw import KEPT, SOFT, lives, masks, shares, svg
from trained_page import against, change, finished, names, origin, save, spread, table

RESULTS = Path(__file__).parents[1] / "results"
BASE = "base"
TITLES = {"recall": "Associative recall", "text": "Running text"}

INTRO = """\
# What makes dynamic masks work

Small DMA models that differ from a base in one thing each, trained by `dynmask train` on the same
batches, and what their scores keep. The recipes are those of `benchmarks/trained/mechanism`; every
figure stands in `benchmarks/results/trained_mechanism.jsonl` with its recipe, seed, commit, device
and time.

**What this is not.** Small models, trained for minutes: they do not say how the rows would stand
for larger ones or after more text.

**Protocol.** A row of a table is the base's recipe with what its name says. *Keys a row sees* is
`w`, the nearest keys that are forced in included; *density* is the share of the causal pairs that
this makes, at the length of the test. *Nearest* keys are not part of the choice: a key enters it
when it is no longer near, and then the best `keep` are kept. They are forced in by the benchmark;
the package's option for the same, `DmaConfig.window`, came later and counts them in `keep`, and
DMA as published has none. *Fixed*: `Wdt` and `A` are not trained; values, which the score reads,
are, by its gradient too. There is one learning
rate, the base's own; a row that wants another is wronged. Batches and, but for `A`, initial
weights are the same at the same seed.

"""

RECALL = """\
{parameters:.2f}M parameters, {tokens:.1f}M tokens of training in rows of {length} tokens: {fewest}
to {most} pairs of a key and a value, then every key once more between filler. Its value is to be
named, the arg max over all {vocab} tokens; to name any value of the row is right once in as many as
there are pairs, and any that was not yet answered (1 + 1/2 + ... + 1/n) / n of the time: {easy}.
{n} test rows of {length} tokens for each number of pairs. Behind ± stand 1.96
standard errors of the rows, seeds pooled; in brackets the least and the largest of the seeds.
*Against base* is the mean difference at {most} pairs, in points, with a 95 % interval from the rows
of both, which says nothing of the seeds' scatter.
"""

TEXT = """\
{parameters:.2f}M parameters, {tokens:.2f}M tokens of training ({epochs:.1f} epochs of the texts) in
rows of {length} tokens. Perplexity of {n} windows of {length} tokens of other novels. *Against
base* is the relative change, window by window, at the same seeds, with a 95 % interval from the
scatter of the windows: that of the seeds comes on top.
"""

CHANGED = """\
**w changed at inference.** The same models with half and with twice the keys that they were
trained with:
"""


def page(rows: Sequence[Row], stem: str) -> tuple[str, dict[str, str]]:
    """The page's Markdown, and its pictures by name, which begins with ``stem``.

    Raises:
        ValueError: there are no finished cells.
    """
    rows = finished(rows)
    if not any("recall" in row or "perplexity" in row for row in rows):
        raise ValueError("there are no finished cells; run mechanism.py first")
    parts = [INTRO, origin(rows) + "\n"]
    pictures: dict[str, str] = {}
    for task in names(rows):
        mine = [row for row in rows if row["part"] == task]
        parts += [f"## {TITLES[task]}\n"]
        parts += [on_recall(mine) if task == "recall" else on_text(mine)]
        name = f"{stem}-{task}-rows.svg"
        parts += [verdict(mine), f"![Each row against base]({name})\n"]
        pictures[name] = dots(mine, task)
        base = [row for row in mine if row["method"] == BASE and "picks" in row]
        if base:
            text, drawn = what_is_kept(f"{stem}-{task}", base)
            parts.append(text)
            pictures |= drawn
    return "\n".join(parts), pictures


def listed(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The runs of each row that did not diverge, by seed, in order of the rows."""
    return {
        name: sorted(
            (r for r in rows if r["method"] == name and "diverged" not in r),
            key=lambda r: r["seed"],
        )
        for name in dict.fromkeys(r["method"] for r in rows)
    }


def seen_keys(row: Row) -> int | None:
    """Keys that a row sees in all; None for all."""
    keep = row["recipe"]["model"]["keep"]
    return None if keep is None else keep + row["recipe"].get("nearest", 0)


def density(seen: int | None, length: int) -> float:
    """Pairs of a row and a key that it sees, over all causal pairs: row i sees min(i + 1, w)."""
    return sum(min(i + 1, seen or length) for i in range(length)) / (length * (length + 1) / 2)


def _what(row: Row, length: int) -> list[str]:
    seen = seen_keys(row)
    near = row["recipe"].get("nearest", 0)
    said = "all" if seen is None else str(seen)
    return [said + (f" ({near} nearest)" if near else ""), f"{density(seen, length):.2f}"]


def _unanswered(pairs: int) -> float:
    """Right by naming any value that has not been answered yet, each being asked once."""
    return statistics.fmean(1 / left for left in range(1, pairs + 1))


def on_recall(rows: Sequence[Row]) -> str:
    """Accuracy by number of pairs."""
    runs = listed(rows)
    some = next(row for row in rows if "recall" in row)
    counts = [at["pairs"] for at in some["recall"]]
    length, data = some["recall"][0]["length"], some["recipe"]["data"]
    base = {row["seed"]: row for row in runs[BASE]}
    lines: list[list[str]] = []
    changed: list[list[str]] = []
    for name, mine in runs.items():
        if not mine:
            lines.append([name, "", "", "", "diverged", *[""] * len(counts)])
            continue
        pairs = [
            (row["recall"][-1], base[row["seed"]]["recall"][-1])
            for row in mine
            if row["seed"] in base and name != BASE
        ]
        lines.append(
            [
                name,
                *_what(mine[0], length),
                str(len(mine)),
                *(accuracy([row["recall"][at] for row in mine]) for at in range(len(counts))),
                difference(pairs),
                f"{statistics.fmean(row['valid_loss'] for row in mine):.3f}",
            ]
        )
        if "keep_changed" in mine[0]:
            each = [
                [100 * row["keep_changed"][0]["recall"][-1]["accuracy"] for row in mine],
                [100 * row["recall"][-1]["accuracy"] for row in mine],
                [100 * row["keep_changed"][1]["recall"][-1]["accuracy"] for row in mine],
            ]
            keep = mine[0]["recipe"]["model"]["keep"]
            changed.append([name, str(keep), *(spread(values, ".1f") for values in each)])
    head = ["row", "keys a row sees", "density", "seeds", *(f"{n} pairs, %" for n in counts)]
    said = RECALL.format(
        parameters=some["parameters"] / 1e6,
        tokens=some["tokens"] / 1e6,
        length=length,
        fewest=data["fewest"],
        most=data["pairs"],
        vocab=data["vocab"] + data["filler"],
        n=f"{some['recall'][0]['rows']:,}",
        easy=", ".join(f"{100 * _unanswered(n):.0f} % of {n} pairs" for n in counts),
    )
    return "\n".join(
        [
            said,
            table([*head, "against base", "held-out loss"], lines),
            CHANGED,
            table(
                [
                    "row",
                    "keep",
                    *(f"{x} keep: {counts[-1]} pairs, %" for x in ("half", "own", "double")),
                ],
                changed,
            ),
        ]
    )


def accuracy(found: Sequence[Row]) -> str:
    """Mean of the seeds with the rows' error, and the seeds' range."""
    values = [100 * at["accuracy"] for at in found]
    error = 196 * math.sqrt(sum(at["error"] ** 2 for at in found)) / len(found)
    shown = f"{statistics.fmean(values):.1f} ± {error:.1f}"
    return shown if len(values) == 1 else f"{shown} ({min(values):.1f} to {max(values):.1f})"


def difference(pairs: Sequence[tuple[Row, Row]]) -> str:
    """Mean difference of accuracies in points with its interval, see `gap`."""
    if not pairs:
        return ""
    mean, error = gap(pairs)
    return f"{mean:+.1f} ± {error:.1f}"


def gap(pairs: Sequence[tuple[Row, Row]]) -> tuple[float, float]:
    """Mean difference of accuracies in points, and 1.96 standard errors of the rows of both."""
    mean = 100 * statistics.fmean(a["accuracy"] - b["accuracy"] for a, b in pairs)
    error = 196 * math.sqrt(sum(a["error"] ** 2 + b["error"] ** 2 for a, b in pairs)) / len(pairs)
    return mean, error


def on_text(rows: Sequence[Row]) -> str:
    """Perplexity."""
    runs = listed(rows)
    some = next(row for row in rows if "perplexity" in row)
    length = some["recipe"]["phases"][-1]["length"]
    base = {row["seed"]: row["perplexity"]["rows"] for row in runs[BASE]}
    lines: list[list[str]] = []
    changed: list[list[str]] = []
    for name, mine in runs.items():
        if not mine:
            lines.append([name, "", "", "", "diverged", ""])
            continue
        pairs = [
            (row["perplexity"]["rows"], base[row["seed"]])
            for row in mine
            if row["seed"] in base and name != BASE
        ]
        lines.append(
            [
                name,
                *_what(mine[0], length),
                str(len(mine)),
                spread([row["perplexity"]["score"] for row in mine], ".1f"),
                against(pairs),
                f"{statistics.fmean(row['perplexity']['bits_per_byte'] for row in mine):.4f}",
            ]
        )
        if "keep_changed" in mine[0]:
            own = [row["perplexity"]["rows"] for row in mine]
            for_each = [
                against(
                    [(row["keep_changed"][at]["rows"], o) for row, o in zip(mine, own, strict=True)]
                )
                for at in (0, 1)
            ]
            changed.append([name, str(mine[0]["recipe"]["model"]["keep"]), *for_each])
    head = [
        "row",
        "keys a row sees",
        "density",
        "seeds",
        "perplexity",
        "against base",
        "bits a byte",
    ]
    said = TEXT.format(
        parameters=some["parameters"] / 1e6,
        tokens=some["tokens"] / 1e6,
        epochs=some["epochs"],
        length=length,
        n=some["perplexity"]["n"],
    )
    return "\n".join(
        [
            said,
            table(head, lines),
            CHANGED,
            table(["row", "keep", "perplexity at half", "perplexity at double"], changed),
        ]
    )


WHAT = """\
### What its scores keep

Base, seed {seed}, {windows} windows of {length} tokens, w = {keep}; only rows that have a choice
count. The picture shows the keys that each row sees in one window, in blue: a key's column begins
at the diagonal and ends where {keep} better ones have come. Rows above the dotted line see all.
Layers count from 0.
"""


def what_is_kept(stem: str, base: Sequence[Row]) -> tuple[str, dict[str, str]]:
    """Pictures of the first seed, and tables over all seeds."""
    first = base[0]
    own = first["picks"][1]
    made = {
        f"{stem}-masks.svg": masks(first["expiry"], own["keep"]),
        f"{stem}-types.svg": shares(own),
        f"{stem}-lives.svg": lives(first["picks"]),
    }
    said = WHAT.format(
        seed=first["seed"], windows=own["windows"], length=own["length"], keep=own["keep"]
    )
    parts = [said, f"![Keys that each row sees]({stem}-masks.svg)\n"]
    parts += [
        "Share of the kept pairs by type and position, over their share of all causal pairs (in "
        "brackets behind the name): 1 is what chance would keep.\n",
        f"![Kept over chance by type and position]({stem}-types.svg)\n",
        ranges(own),
        "How many rows see an admitted key: median, middle half and 10 % to 90 %, at half, own "
        "and double w (dotted); those alive at the end are cut off there.\n",
        f"![How long keys live]({stem}-lives.svg)\n",
        f"Over w, mean of the layers and kv heads, {_seeds(base)}:\n",
        over_keep(base),
        by_layer(base),
    ]
    return "\n".join(parts), made


def ranges(own: Row) -> str:
    """How far kept over chance is from 1, by type and by position, over all layers and heads."""

    def ends(part: str) -> str:
        ratios = [
            kept / at["causal"]
            for at in own[part].values()
            if at["causal"]
            for layer in at["kept"]
            for kept in layer
        ]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    # A row that has a choice sees w keys, and there are so many last ones.
    near = mean_of(own["places"]["last"]["kept"]) * own["keep"] / own["last"]
    return (
        f"From {ends('types')} by type and from {ends('places')} by position: the score reads a "
        f"token's values and no position. So a row sees {100 * near:.0f} % of its own last "
        f"{own['last']} keys (mean of layers and heads).\n"
    )


def _seeds(rows: Sequence[Row]) -> str:
    return f"{len(rows)} seed{'s' if len(rows) > 1 else ''}" + (
        " (least to largest)" if len(rows) > 1 else ""
    )


def mean_of(values: Any) -> float:
    """Mean of nested lists."""
    if isinstance(values, list):
        return statistics.fmean(mean_of(value) for value in values)
    return float(values)


def over_keep(base: Sequence[Row]) -> str:
    """What changes with w at inference."""
    lines = []
    some = base[0]["picks"]

    def add(name: str, of: Callable[[Row], float], form: str, whole: str = "") -> None:
        found = (spread([of(row["picks"][at]) for row in base], form) for at in range(len(some)))
        lines.append([name, whole, *found])

    for part in ("types", "places"):
        for name, at in some[1][part].items():
            if at["causal"]:
                said = {"first": f"first {some[1]['first']}", "last": f"last {some[1]['last']}"}
                add(
                    said.get(name, name) if part == "places" else name,
                    lambda p, part=part, name=name: 100 * mean_of(p[part][name]["kept"]),  # type: ignore[misc]
                    ".1f",
                    f"{100 * at['causal']:.1f}",
                )
    add("keys never admitted", lambda p: 100 * (1 - mean_of(p["admitted"])), ".1f")
    add("shared by two kv heads of a layer", lambda p: 100 * mean_of(p["overlap"]), ".1f")
    add("the same by chance", lambda p: 100 * p["by_chance"], ".1f")
    add(
        f"kept in both, at it and at w = {some[1]['keep']}",
        lambda p: 100 * mean_of(p["kept_by_own"]),
        ".1f",
    )
    return table(["%", "of all pairs", *(f"w = {row['keep']}" for row in some)], lines)


def by_layer(base: Sequence[Row]) -> str:
    """What two heads share and what stays when w changes, by layer."""
    layers = len(base[0]["picks"][1]["overlap"])
    half, _, double = (row["keep"] for row in base[0]["picks"])
    lines = [
        [
            str(layer),
            *(
                spread([100 * row["picks"][at][name][layer] for row in base], ".1f")
                for at, name in ((1, "overlap"), (0, "kept_by_own"), (2, "kept_by_own"))
            ),
        ]
        for layer in range(layers)
    ]
    head = ["layer", "shared by two kv heads, %", f"of w = {half} kept at own w, %"]
    return table([*head, f"of own w kept at w = {double}, %"], lines)


def verdict(rows: Sequence[Row]) -> str:
    """Which rows are better and worse than base beyond the test's interval, and which are not."""
    runs = listed(rows)
    base = {row["seed"]: row for row in runs[BASE]}
    found: dict[str, list[str]] = {"better": [], "worse": [], "neither": []}
    for name, mine in runs.items():
        pairs = [(row, base[row["seed"]]) for row in mine if row["seed"] in base]
        if name == BASE or not pairs:
            continue
        if "recall" in pairs[0][0]:
            mean, error = gap([(a["recall"][-1], b["recall"][-1]) for a, b in pairs])
            low, high = mean - error, mean + error
        else:
            both = [(b["perplexity"]["rows"], a["perplexity"]["rows"]) for a, b in pairs]
            low, _, high = change(both)
        found["better" if low > 0 else "worse" if high < 0 else "neither"].append(name)
    said = [f"{what}: {', '.join(each) or 'none'}" for what, each in found.items()]
    single = any(len(mine) == 1 for mine in runs.values())
    alone = " Rows with one seed: what another would do is not known." if single else ""
    return f"Beyond the test's interval, against base: {'; '.join(said)}.{alone}{scatter(base)}\n"


def scatter(base: dict[int, Row]) -> str:
    """How far apart the base's own seeds are, if there are several."""
    rows = list(base.values())
    if len(rows) < 2:
        return ""
    if "recall" in rows[0]:
        values = [100 * row["recall"][-1]["accuracy"] for row in rows]
        apart = f"{max(values) - min(values):.1f} points"
    else:
        values = [row["perplexity"]["score"] for row in rows]
        apart = f"{100 * (max(values) / min(values) - 1):.1f} %"
    return f" Base's own {len(rows)} seeds are {apart} apart: smaller differences may be chance."


def dots(rows: Sequence[Row], task: str) -> str:
    """Each run's accuracy with most pairs, or change of perplexity, with the test's interval."""
    runs = {name: mine for name, mine in listed(rows).items() if mine}
    base = {row["seed"]: row for row in runs[BASE]}
    with svg(6.4, 0.26 * len(runs) + 0.8, 1, 1) as (_, panels, made):
        axes = panels[0][0]
        for y, mine in enumerate(runs.values()):
            for row in mine:
                low, value, high = bounds(row, base.get(row["seed"], row))
                axes.plot([low, high], [y, y], color=KEPT, lw=1.2, alpha=0.7)
                axes.plot([value], [y], "o", color=KEPT, ms=4)
        axes.axvline(
            statistics.fmean(bounds(row, row)[1] for row in runs[BASE]),
            color=SOFT,
            lw=0.7,
            ls=":",
        )
        axes.set_yticks(range(len(runs)), list(runs))
        axes.set_ylim(len(runs) - 0.5, -0.5)
        if task == "recall":
            pairs = runs[BASE][0]["recall"][-1]["pairs"]
            axes.axvline(100 / pairs, color=SOFT, lw=0.7)
            axes.set_xlim(left=0)
            axes.set_xlabel(f"right with {pairs} pairs, %; line: a guess among the row's values")
        else:
            axes.set_xlabel("change of perplexity against base at the same seed, %")
    return made[0]


def bounds(row: Row, base: Row) -> tuple[float, float, float]:
    """A run's figure between the ends of its 95 % interval, in percent."""
    if "recall" in row:
        at = row["recall"][-1]
        value, error = 100 * at["accuracy"], 196 * at["error"]
        return value - error, value, value + error
    low, value, high = change([(row["perplexity"]["rows"], base["perplexity"]["rows"])])
    return 100 * low, 100 * value, 100 * high


def write(rows: Sequence[Row], path: Path) -> None:
    """Write the page and beside it its pictures."""
    save(*page(rows, path.stem), path)


def main() -> None:
    from cells import read_rows

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "trained_mechanism.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        write(read_rows(args.results), args.out)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
