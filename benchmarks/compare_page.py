"""The page of `compare.py`: a table and a plot for each checkpoint, from the kept cells."""

from __future__ import annotations

import io
import math
import random
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dynmask.dam import Dynamic

Row = dict[str, Any]
DEFAULT = Dynamic().coverage

PROTOCOL = """\
Every method runs in the same layers on the same engine, prompt by prompt (batch 1), on the same
prompts; only which keys a row sees differs.

- **Recall**: many questions with their answers inside the prompt, then {filler} tokens of other
  text, one forward pass. A question is right if each token of its answer is the most likely one.
  So the rows that have to find the fact are rows of the sparse prefill. Methods that prune in
  decoding alone take no part.
- **Decoded**: the answer is decoded greedily after the prompt, under the method as well. SnapKV
  and the capped cache read prompt and question in one call, since the question has to choose what
  stays; all others read the prompt once for several questions. The first token of an answer comes
  from the prompt's own pass, which SnapKV and Quest run dense. `dynamic` decodes over
  `run.cache()`.
- **Density** is measured: pairs of a row and a key that the masks show, over all causal pairs, mean
  of all layers and heads; in the prefill for recall and perplexity, in the decoded rows for decoded
  tasks, where that of the prompt's own pass stands beside it. Of a capped cache it is its slots
  over the prompt's tokens.
- **Settings**: one number of each method, the same in all layers and heads, is searched so that the
  density on {prompts} other prompts of the task (seed {calibration}; one for the slow methods)
  comes within {tolerance} of the target, or as close as it can: `keep` of exact top-k, the window
  of StreamingLLM, equally many columns and diagonals of vertical-slash, and so on
  (`benchmarks/compare/all.yaml`, where everything else is, too). `dynamic` has no target: its rows
  are values of `coverage`, whose default is {default}.
- **Intervals** are Wilson's, 95 %; the seed of the questions is {seed}. *Against full attention*
  counts the questions that only one of both gets: worse, better, and the p-value of the exact
  sign test (McNemar's, where an answer is right or wrong). The difference in points has a 95 %
  interval from a paired bootstrap over prompts (2,000 draws), as the questions of a prompt share
  what is hidden. For perplexity it is the relative change with an interval from the windows'
  differences.
- **Seconds** are of the whole forward passes, selection included, per prompt or (decoded) per
  question, from one run each: orders of magnitude, above all on a CPU, where other work may have
  gone on beside. Exact top-k, top-p and H2O are written for exactness and not for speed. MiB is the
  GPU's peak, weights included.
"""


def write_page(rows: Sequence[Row], path: Path) -> None:
    """Write the Markdown page and beside it one SVG for each checkpoint.

    Raises:
        ValueError: There are no finished cells.
    """
    latest = list({row["key"]: row for row in rows}.values())
    if not any("score" in row for row in latest):
        raise ValueError("there are no finished cells; run compare.py first")
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = ["# Training-free methods at equal density\n", _protocol(latest)]
    for name in dict.fromkeys(row["checkpoint"] for row in latest):
        mine = _newest(row for row in latest if row["checkpoint"] == name)
        image = path.with_name(f"{path.stem}-{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.svg")
        image.write_text(plot(mine), encoding="utf-8")
        parts.append(f"## {name}\n\n{_origin(mine)}\n\n![Score by density]({image.name})\n")
        parts += [_section(task, mine) for task in _tasks(mine)]
    path.write_text("\n".join(parts), encoding="utf-8")


def _newest(rows: Iterator[Row]) -> list[Row]:
    """The cells of the weights that were measured last, each figure once."""
    listed = list(rows)
    weights = listed[-1]["weights"]
    cells: dict[tuple[str, str, float], Row] = {}
    for row in listed:
        if row["weights"] == weights and "failed" not in row:
            cells[row["task"]["name"], row["method"], row["target"]] = row
    return list(cells.values())


def _tasks(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["task"]["name"] for row in rows))


def _protocol(rows: Sequence[Row]) -> str:
    row = rows[-1]
    return PROTOCOL.format(
        default=DEFAULT,
        filler=max(r["task"]["filler"] for r in rows),
        prompts=row["calibration"]["prompts"],
        calibration=row["calibration"]["seed"],
        tolerance=f"{100 * row['calibration']['tolerance']:g} %",
        seed=row["seed"],
    )


def _origin(rows: Sequence[Row]) -> str:
    def all_of(name: str) -> str:
        return ", ".join(sorted({str(row[name]) for row in rows if row[name]})) or "unknown"

    versions = ", ".join(sorted({f"torch {row['versions']['torch']}" for row in rows}))
    days = ", ".join(sorted({row["date"][:10] for row in rows}))
    return (
        f"{all_of('device')}, {all_of('dtype')}, {versions}, {days}; commit {all_of('commit')}; "
        f"weights `{rows[0]['weights']}`."
    )


def _section(task: str, rows: Sequence[Row]) -> str:
    mine = [row for row in rows if row["task"]["name"] == task]
    full = next((row for row in mine if row["method"] == "full"), None)
    if full is None:
        return f"### {task}\n\nFull attention is missing.\n"
    lines = [f"### {task}\n", _what(full), ""]
    if len(mine) == 1:
        return "\n".join([*lines, f"Full attention gets {_score(full)}: not compared.\n"])
    lines += [
        "| method | target | density | score | 95 % | against full | worse/better | p | s | MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row, full) for row in sorted(mine, key=_order)]
    lines += _depths(mine)
    return "\n".join([*lines, ""])


def _what(full: Row) -> str:
    task = full["task"]
    unit = "windows" if task["run"] == "perplexity" else "questions"
    kind = "decoded" if task["path"] == "decode" else task["run"]
    return f"{kind}, {full['n']} {unit}, {full['tokens']:,.0f} tokens a prompt."


def _order(row: Row) -> tuple[int, float, str]:
    group = 0 if row["method"] == "full" else 1 if row["of_values"] else 2
    return group, row["target"], row["method"]


def _line(row: Row, full: Row) -> str:
    name = f"`{row['method']}`" if row["method"] != "full" else "full attention"
    target = f"coverage {row['target']:g}" if row["of_values"] else f"{row['target']:g}"
    if "skipped" in row:
        return f"| {name} | {target} | {row['skipped']} | | | | | | | |"
    density = row["density"].get(row["task"]["path"], 1.0)
    shown = f"{density:.3f}"
    if row["task"]["path"] == "decode":
        shown += f" (prefill {row['density'].get('prefill', 1.0):.3f})"
    cells = [name, target if row is not full else "", shown, _score(row)]
    cells.append(" to ".join(f"{100 * end:.1f}" for end in row.get("interval", ())))
    cells += ["", "", ""] if row is full else _against(row, full)
    prompts = row["prompts"] if row["task"]["path"] == "prefill" else row["n"]
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
    return "| " + " | ".join([*cells, f"{row['seconds'] / prompts:.3f}", peak]) + " |"


def _score(row: Row) -> str:
    return f"{row['score']:.3f}" if not row["strings"] else f"{100 * row['score']:.1f} %"


def _against(row: Row, full: Row) -> list[str]:
    """The difference to full attention, who is right where the other is not, and p."""
    if not row["strings"]:
        low, middle, high = relative_change(row["losses"], full["losses"][: row["n"]])
        return [f"{middle:+.2%} ({low:+.2%} to {high:+.2%})", "", ""]
    mine, theirs = ([int(mark) for mark in r["marks"][: row["n"]]] for r in (row, full))
    each = max(1, row["task"]["questions"])
    scale = 100 / row["strings"]
    low, middle, high = (scale * x for x in paired_bootstrap(mine, theirs, group=each))
    worse = sum(a < b for a, b in zip(mine, theirs, strict=True))
    better = sum(a > b for a, b in zip(mine, theirs, strict=True))
    p = sign_test(worse, better)
    note = f" (n {row['n']})" if row["n"] < full["n"] else ""
    shown = "< 0.001" if p < 0.001 else f"{p:.3f}"
    return [f"{middle:+.1f} ({low:+.1f} to {high:+.1f}){note}", f"{worse} / {better}", shown]


def sign_test(worse: int, better: int) -> float:
    """Two-sided p-value of so many signs if both were equally likely (McNemar's exact test)."""
    n = worse + better
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(worse, better) + 1)) / 2**n
    return min(1.0, 2 * tail)


def paired_bootstrap(
    mine: Sequence[float], theirs: Sequence[float], *, group: int, draws: int = 2000
) -> tuple[float, float, float]:
    """Mean difference with its 95 % interval: (low, mean, high).

    Args:
        mine: A mark for each question.
        theirs: Those of the other method, on the same questions.
        group: Questions that are drawn together, as they share a prompt.
        draws: Resamples.
    """
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    groups = [differences[at : at + group] for at in range(0, len(differences), group)]
    sums = [(sum(g), len(g)) for g in groups]
    rng = random.Random(0)
    means = []
    for _ in range(draws):
        drawn = rng.choices(sums, k=len(sums))
        means.append(sum(s for s, _ in drawn) / sum(n for _, n in drawn))
    means.sort()
    at = int(0.025 * draws)
    return means[at], statistics.fmean(differences), means[-1 - at]


def relative_change(losses: Sequence[float], full: Sequence[float]) -> tuple[float, float, float]:
    """Change of the perplexity, ``exp(mean difference) - 1``, with a 95 % interval from windows."""
    differences = [a - b for a, b in zip(losses, full, strict=True)]
    mean = statistics.fmean(differences)
    half = 0.0
    if len(differences) > 1:
        half = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
    return math.expm1(mean - half), math.expm1(mean), math.expm1(mean + half)


def _depths(rows: Sequence[Row]) -> list[str]:
    """Scores by tenth of the fact's depth, of full attention and the default dynamic masks."""
    full = next(row for row in rows if row["method"] == "full")
    if not full.get("tenths") or full["task"]["kind"] in ("vt", "multivalue", "multiquery"):
        return []
    chosen = [
        row
        for row in rows
        if row["method"] == "full" or (row["of_values"] and row["target"] == DEFAULT)
    ]
    head = "| depth, % | " + " | ".join(f"{10 * i}-{10 * i + 10}" for i in range(10)) + " |"
    lines = ["", head, "|---" * 11 + "|"]
    for row in chosen:
        shares = []
        for tenth in range(10):
            marks = [
                int(mark)
                for mark, at in zip(row["marks"], full["tenths"], strict=False)
                if int(at) == tenth
            ]
            shares.append(f"{100 * sum(marks) / len(marks) / row['strings']:.0f}" if marks else "")
        lines.append(f"| {row['method']} | " + " | ".join(shares) + " |")
    return lines


def plot(rows: Sequence[Row]) -> str:
    """Draw the score of every method against its measured density, a panel for each task."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    tasks = [t for t in _tasks(rows) if sum(row["task"]["name"] == t for row in rows) > 1]
    columns = min(3, max(1, len(tasks)))
    lines = max(1, -(-len(tasks) // columns))
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m != "full"]
    # A fixed salt and no date: the same figures give the same file.
    with rc_context({"svg.hashsalt": "dynmask", "svg.fonttype": "path"}):
        figure = Figure(figsize=(4 * columns, 3 * lines + 0.6), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(lines, columns, squeeze=False).flatten()
        for axes in panels[len(tasks) :]:
            axes.set_axis_off()
        for axes, task in zip(panels, tasks, strict=False):
            _panel(axes, [row for row in rows if row["task"]["name"] == task], methods)
        if methods:
            handles = [
                figure.axes[0].plot(
                    [], [], color=f"C{at % 10}", marker=_MARKERS[at % 8], label=name
                )[0]
                for at, name in enumerate(methods)
            ]
            figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


_MARKERS = "osD^vP*X"


def _panel(axes: Any, rows: Sequence[Row], methods: Sequence[str]) -> None:
    for row in rows:
        if row["method"] == "full" and "score" in row:
            axes.axhline(row["score"], color="black", linewidth=0.8, linestyle="--")
    for at, name in enumerate(methods):
        points = sorted(
            (row["density"].get(row["task"]["path"], 1.0), row["score"], row.get("interval"))
            for row in rows
            if row["method"] == name and "score" in row
        )
        if not points:
            continue
        x, y = [p[0] for p in points], [p[1] for p in points]
        axes.plot(x, y, color=f"C{at % 10}", marker=_MARKERS[at % 8], markersize=4, linewidth=1)
        for density, _, interval in points:
            if interval:
                axes.plot([density, density], interval, color=f"C{at % 10}", linewidth=0.6)
    perplexity = rows[0]["task"]["run"] == "perplexity"
    axes.set_title(rows[0]["task"]["name"], loc="left", fontsize=9)
    axes.set_xlabel("measured density", fontsize=8)
    axes.set_ylabel("perplexity" if perplexity else "score", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_xlim(left=0)
    if not perplexity:
        axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.3)
