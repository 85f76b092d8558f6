"""What makes dynamic mask attention work: models that differ in one thing, and what they keep.

    python benchmarks/trained/mechanism.py --jobs 3                          # recall, on a CPU
    python benchmarks/trained/mechanism.py --data BOOKS --texts BOOKS/test.jsonl.xz  # text, too

Two tasks: associative recall, and running text (perplexity of other text), which needs --data. A
row of the table is the task's recipe in mechanism/ with what mechanism/rows.yaml changes in it. A
finished cell is a line of --out at once; the same command goes on where it ended. All rows at the
first seed come first, then the other seeds. Models stay in --runs, for picks.py, and for other
questions to them.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from cells import DEVICE, HERE, Runner, Task, arguments, parameters, tidy
from fixed import fixed_scores
from grid import Cell, Grid, Part, Row, digest
from jobs import go
from kinds import kinds_of_recall
from mqar import SEED, accuracy
from nearest import nearest
from picks import expiries, statistics, when_keep_changes, windows_of_text

from dynmask.assets import load_texts
from dynmask.cli.inputs import read_texts
from dynmask.eval import perplexity
from dynmask.train.mqar import Mqar, Recall
from dynmask.train.source import Step

BASE = "base"


@dataclass(frozen=True)
class Ablations:
    """What mechanism/rows.yaml holds.

    Attributes:
        folder: where the recipes lie, one a task.
        tasks: names of the recipes.
        seeds: of weights and batches.
        rows: by name what is changed, see `settings`, `near` and `fixed`.
        evaluation: by task what is measured.
    """

    folder: Path
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: dict[str, dict[str, Any]]
    evaluation: dict[str, dict[str, Any]]

    @classmethod
    def load(cls, path: Path) -> Ablations:
        """Read a file."""
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        folder = path.parent / raw["recipes"]
        return cls(folder, tuple(raw["tasks"]), tuple(raw["seeds"]), raw["rows"], raw["evaluation"])

    def settings(self, row: str, task: str) -> tuple[str, ...]:
        """What a row changes in a task's recipe."""
        return (*self.rows[row].get("set", ()), *self.rows[row].get(task, ()))

    def near(self, row: str, task: str) -> int:
        """Nearest keys that every row sees besides."""
        given = self.rows[row].get("nearest", 0)
        return int(given[task] if isinstance(given, dict) else given)

    def fixed(self, row: str) -> bool:
        """Whether ``Wdt`` and ``A`` are not trained."""
        return bool(self.rows[row].get("fixed", False))

    def cell(self, row: str, task: str, seed: int, *, free: list[str]) -> Cell:
        """One run. Its part is the task, its method the row."""
        grid = Grid("mechanism", (task,), (), {})
        settings = self.settings(row, task)
        lr = yaml.safe_load((self.folder / f"{task}.yaml").read_text(encoding="utf-8"))["lr"]
        part = Part(task, (lr,), (seed,), settings=settings)
        made = grid.cell(self.folder, part, task, lr, seed, free=free)
        near, fixed = self.near(row, task), self.fixed(row)
        besides = [*([near] if near else []), *(["fixed"] if fixed else [])]
        key = digest([made.key, *besides]) if besides else made.key
        named = made.named | ({"nearest": near} if near else {})
        named |= {"fixed": True} if fixed else {}
        return dataclasses.replace(made, method=row, key=key, named=named)


class Mechanism(Runner):
    """Fills one file with the cells of all rows.

    Args:
        ablations: the rows.
        args: what `arguments` made.
        texts: for the perplexity.
    """

    def __init__(self, ablations: Ablations, args: argparse.Namespace, texts: list[str]):
        super().__init__(Grid("mechanism", (), (), {}), ablations.folder, args)
        self.ablations, self.texts = ablations, texts

    def cells(self) -> Iterator[Cell]:
        """Every row of every task that has data, at the first seed, then at the others."""
        for seed in self.ablations.seeds:
            for task in self.ablations.tasks:
                for row in self.ablations.rows:
                    cell = self.ablations.cell(row, task, seed, free=self.args.set)
                    data: Any = cell.recipe.data
                    if not isinstance(data, Mqar) and not (data.path or self.args.data):
                        continue
                    if self.wanted(part=task, method=row, lr=cell.recipe.lr, seed=seed):
                        yield cell

    def work(self) -> None:
        """Train and measure every cell that is not there yet.

        Raises:
            OutOfTime: the budget is spent; the run in progress has a checkpoint.
        """

        def make(cell: Cell, key: str) -> None:
            near = self.ablations.near(cell.method, cell.part)
            with nearest(near), fixed_scores(self.ablations.fixed(cell.method)):
                row = self.trained(cell) | {"key": key}
                if "failed" not in row and "diverged" not in row:
                    row |= self.measured(cell, self.evaluate)
            self.append(row)
            if "failed" not in row:
                tidy(self.runs / cell.key)

        def tasks() -> Iterator[Task]:
            for cell in self.cells():
                key = digest([cell.key, self.ablations.evaluation[cell.part]])
                yield key, partial(make, cell, key)

        self.fill(tasks)

    def evaluate(self, model: Any, tokenizer: Any, cell: Cell) -> Row:
        """What is measured on a trained model."""
        wanted = self.ablations.evaluation[cell.part]
        found = self.on_text(model, tokenizer, wanted) if tokenizer else recall(model, cell, wanted)
        found["parameters"] = parameters(model)
        windows = found.pop("windows")
        if model.config.keep is None or self.ablations.near(cell.method, cell.part):
            return found  # Their rows see other keys than the scores pick.
        sizes = {"first": wanted["first"], "last": wanted["last"]}
        if cell.method != BASE:
            return found | {"picks": [statistics(model, windows, **sizes)]}
        found["picks"] = when_keep_changes(model, windows, **sizes)
        found["expiry"] = expiries(model, windows[0][0]).tolist()
        return found

    def on_text(self, model: Any, tokenizer: Any, wanted: Row) -> Row:
        """Perplexity at the model's keep, at half and double."""
        length, count = wanted["length"], wanted["windows"]

        def measured() -> Row:
            result = perplexity(model, tokenizer, self.texts, length=length, windows=count)
            kept = result.to_json()
            return {
                "score": kept["score"],
                "n": kept["n"],
                "nll": kept["metrics"]["nll"],
                "bits_per_byte": kept["metrics"]["bits_per_byte"],
                "rows": [round(row["nll"], 5) for row in kept["rows"]],
            }

        found: Row = {"perplexity": measured()}
        own = model.config.keep
        if own is not None:
            found["keep_changed"] = []
            for keep in (own // 2, 2 * own):
                model.config.keep = max(1, keep)
                found["keep_changed"].append({"keep": max(1, keep)} | measured())
            model.config.keep = own
        found["windows"] = windows_of_text(
            tokenizer, self.texts, length=length, windows=wanted["picked"]
        )
        note = f"perplexity {found['perplexity']['score']:.3f}"
        return found | {"note": note}


def recall(model: Any, cell: Cell, wanted: Row) -> Row:
    """Accuracy by the number of pairs, at the model's keep, at half and at double."""
    task, length = cell.recipe.data, wanted["length"]
    assert isinstance(task, Mqar)
    task = dataclasses.replace(task, fewest=None)

    def measured() -> list[Row]:
        each = {"rows": wanted["rows"], "tokens": wanted["tokens_per_call"]}
        return [
            accuracy(model, dataclasses.replace(task, pairs=pairs), length, **each)
            for pairs in wanted["pairs"]
        ]

    found: Row = {"recall": measured()}
    own = model.config.keep
    if own is not None:
        found["keep_changed"] = []
        for keep in (own // 2, 2 * own):
            model.config.keep = max(1, keep)
            found["keep_changed"].append({"keep": max(1, keep), "recall": measured()})
        model.config.keep = own
    ids = Recall(task).at(Step(0, 0, 0, wanted["picked"], length, SEED)).ids
    found["windows"] = [(row.tolist(), kinds_of_recall(task, row.tolist())) for row in ids]
    note = " ".join(f"{x['pairs']} pairs {100 * x['accuracy']:.1f} %" for x in found["recall"])
    return found | {"note": note}


def work(args: argparse.Namespace) -> None:
    """What one process does."""
    if DEVICE == "cpu":
        torch.set_num_threads(min(2, torch.get_num_threads()))
    texts = read_texts(args.texts) if args.texts else load_texts("perplexity")
    Mechanism(Ablations.load(args.grid), args, texts).work()


def main() -> None:
    parser = arguments("mechanism", __doc__ or "")
    parser.add_argument("--texts", nargs="+", help="test texts, no book of --data")
    parser.set_defaults(grid=HERE / "mechanism" / "rows.yaml")
    args = parser.parse_args()
    if args.data and not args.texts:
        parser.error("--texts is missing: other books than those of --data")
    if not args.data:
        print("no --data, a folder of books: associative recall alone")
    go(args, work)


if __name__ == "__main__":
    main()
