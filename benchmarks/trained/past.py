"""Needles and LongEval lines up to and past the trained length, for the models of scaling.py.

    python benchmarks/trained/past.py --data BOOKS --texts BOOKS/test.jsonl.xz --runs runs \
        --budget-seconds 560

A model trained on books alone answers none of these questions, so each is trained on for a few
hundred steps on documents with questions (past/continue.yaml), at the length it was trained at:
keys, numbers and books of the test are others. Then it is asked at several lengths.

Of each method, size and seed the run of least held-out loss is taken from --scaling; its model
must lie in --runs. A finished figure is a line of --out at once.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cells import RESULTS, Runner, Task, arguments, read_rows, tidy
from grid import Cell, Grid, Row, digest
from jobs import go

from dynmask.assets import load_texts
from dynmask.cli.inputs import read_texts
from dynmask.eval import longeval, needle
from dynmask.eval.longeval import make_records
from dynmask.eval.runner import encode
from dynmask.train.recipe import Recipe


def sources(rows: list[Row], grid: Grid) -> list[Row]:
    """Of each part, seed and method of the grid the run of least held-out loss, in that order."""
    best = []
    for part in grid.parts:
        for seed in part.seeds:
            for method in grid.methods:
                mine = [
                    row
                    for row in rows
                    if (row["part"], row["seed"], row["method"]) == (part.name, seed, method)
                    and row.get("valid_loss") is not None
                ]
                if mine:
                    best.append(min(mine, key=lambda row: row["valid_loss"]))
    return best


def continued(source: Row, grid: Grid, folder: Path, runs: Path, free: list[str]) -> Cell:
    """The run that goes on from a trained model, at the learning rate of its recipe."""
    model = runs / source["run"] / "model"
    recipe = Recipe.load(folder / "continue.yaml", settings=[f"seed={source['seed']}", *free])
    part = next(part for part in grid.parts if part.name == source["part"])
    lr = part.lrs[0]
    recipe = dataclasses.replace(
        recipe, model={"type": source["recipe"]["model"]["type"], "from": str(model)}, lr=lr
    )
    named = recipe.identity()
    named["model"] = {**named["model"], "from": source["run"]}
    return Cell(part.name, source["method"], recipe, named, digest([grid.experiment, named]))


def lines_of(tokenizer: Any, length: int) -> int:
    """Lines of a record that fills so many tokens, question and answer included."""
    (record,) = make_records(lines=40, n=1, questions=1, seed=0)
    (longer,) = make_records(lines=80, n=1, questions=1, seed=0)
    first, second = (len(encode(tokenizer, r.text)) for r in (record, longer))
    each = (second - first) / 40
    # Records differ by a few tokens in a thousand; a question takes about 50.
    return int(0.985 * (length - 64 - (first - 40 * each)) / each)


def asked(
    model: Any, tokenizer: Any, texts: list[str], task: str, length: int, evaluation: dict[str, Any]
) -> Row:
    """Accuracy by depth, as `dynmask eval needle` and `dynmask eval longeval` measure it."""
    given = {"n": evaluation["n"], "seed": evaluation["seed"]}
    if task == "needle":
        each = {"length": length, "needles": evaluation["questions"]}
        result = needle(model, tokenizer, texts, **each, **given)
    else:
        lines = lines_of(tokenizer, length)
        result = longeval(model, tokenizer, lines=lines, questions=evaluation["questions"], **given)
    kept = result.to_json()
    marks = [[round(row["depth"], 4), int(row["correct"])] for row in kept.pop("rows")]
    return {
        "task": task,
        "length": length,
        "result": kept | {"marks": marks},
        "note": f"{task} {length}: {100 * result.score:.1f} %",
    }


def fill(runner: Runner, scaling: list[Row], texts: list[str]) -> None:
    """Train all sources on, then ask, each length of all methods together."""
    grid = runner.grid
    found = sources(scaling, grid)
    if not found:
        raise SystemExit("--scaling has no finished runs of this grid")
    cells = []
    for source in found:
        cell = continued(source, grid, runner.folder, runner.runs, runner.args.set)
        if not runner.wanted(
            part=cell.part, method=cell.method, lr=source["lr"], seed=cell.recipe.seed
        ):
            continue
        if not (runner.runs / source["run"] / "model").is_dir():
            print(f"{source['part']} {source['method']}: no model in {runner.runs}; left out")
            continue
        cells.append((cell, source))
    evaluation = grid.evaluation
    heads: dict[str, Row] = {}

    def train(cell: Cell) -> None:
        heads[cell.key] = runner.trained(cell)

    def ask(cell: Cell, source: Row, task: str, length: int, key: str) -> None:
        runner.left()
        # Of a model that another process trained, its log says how that went.
        row = heads.get(cell.key) or runner.trained(cell)
        row = row | {"key": key, "task": task, "length": length, "source": source["key"]}
        if "failed" not in row and "diverged" not in row:
            tidy(runner.runs / cell.key)
            row |= runner.measured(
                cell,
                lambda model, tokenizer, _: asked(
                    model, tokenizer, texts, task, length, evaluation
                ),
            )
        runner.append(row)

    def asks(cell: Cell, source: Row) -> Iterator[Task]:
        for length in evaluation["lengths"]:
            for task in evaluation["tasks"]:
                if runner.wanted(
                    part=cell.part,
                    method=cell.method,
                    lr=source["lr"],
                    seed=cell.recipe.seed,
                    task=task,
                    length=length,
                ):
                    key = digest([cell.key, task, length, evaluation["n"], evaluation["seed"]])
                    yield key, partial(ask, cell, source, task, length, key)

    def tasks() -> Iterator[Task]:
        each = [(cell, list(asks(cell, source))) for cell, source in cells]
        for cell, mine in each:
            if not all(runner.has(key) for key, _ in mine):
                yield cell.key, partial(train, cell)
        # All lists are as long: --only leaves the same questions to every cell.
        for together in zip(*(mine for _, mine in each), strict=True):
            for (cell, _), task in zip(each, together, strict=True):
                # What another process could not train it keeps as such.
                if cell.key in heads or runner.complete(cell):
                    yield task

    runner.fill(tasks)


def work(args: argparse.Namespace) -> None:
    """What one process does."""
    texts = read_texts(args.texts) if args.texts else load_texts("haystack")
    runner = Runner(Grid.load(args.grid), args.grid.parent, args)
    fill(runner, read_rows(args.scaling), texts)


def main() -> None:
    parser = arguments("past", __doc__ or "")
    parser.add_argument("--scaling", type=Path, default=RESULTS / "trained_scaling.jsonl")
    parser.add_argument("--texts", nargs="+", help="haystacks; default those of the package")
    args = parser.parse_args()
    if not args.data:
        parser.error("--data is missing: a folder of books")
    go(args, work)


if __name__ == "__main__":
    main()
