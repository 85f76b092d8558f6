"""What an experiment consists of: recipes by part and method, learning rates, seeds."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dynmask.train.recipe import Recipe

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One row of the tables for each method: a folder of recipes, and what is changed in them."""

    name: str
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    recipes: str = ""
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        key: the same for the same run; a finished cell is recognised by it.
        named: the recipe as it is kept: without paths of this machine.
    """

    part: str
    method: str
    recipe: Recipe
    named: dict[str, Any]
    key: str


@dataclass(frozen=True)
class Grid:
    """What a file such as mqar/grid.yaml holds.

    Attributes:
        experiment: name of the folder.
        methods: names of recipes in a part's folder.
        parts: in the order in which they are run.
        evaluation: what is measured on a trained model.
        times: how trained models are timed, where they are.
    """

    experiment: str
    methods: tuple[str, ...]
    parts: tuple[Part, ...]
    evaluation: dict[str, Any]
    times: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Grid:
        """Read a file."""
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        parts = []
        for part in raw["parts"]:
            whole = {name: raw[name] for name in ("lrs", "seeds") if name in raw} | part
            parts.append(Part(**{k: tuple(v) if k in _LISTS else v for k, v in whole.items()}))
        name, methods = path.parent.name, tuple(raw["methods"])
        return cls(name, methods, tuple(parts), raw["evaluation"], raw.get("times", {}))

    def cell(
        self, folder: Path, part: Part, method: str, lr: float, seed: int, *, free: list[str]
    ) -> Cell:
        """The run of a part, method, learning rate and seed.

        Args:
            folder: where the grid's file lies.
            part: of the grid.
            method: of the grid.
            lr: learning rate.
            seed: of weights and batches.
            free: settings that decide nothing, such as ``compile=false``.
        """
        settings = [*part.settings, f"lr={lr}", f"seed={seed}"]
        recipe = Recipe.load(folder / part.recipes / f"{method}.yaml", settings=settings)
        named = recipe.identity()
        running = Recipe.load(folder / part.recipes / f"{method}.yaml", settings=[*settings, *free])
        if running.identity() != named:
            raise ValueError(f"--set {' '.join(free)}: only what does not decide a run")
        return Cell(part.name, method, running, named, digest([self.experiment, named]))


_LISTS = ("lrs", "seeds", "settings")


def in_order(
    grid: Grid,
    make: Callable[[Part, str, float, int], Cell],
    rows: Callable[[], list[Row]],
) -> Iterator[Cell]:
    """All cells, so that a short budget gives a whole small table.

    Part by part: all methods at the first learning rate and seed, then the other rates, then the
    other seeds at each method's best rate. A method whose rates are not all there is left out of
    the latter.

    Args:
        grid: the experiment.
        make: makes a cell.
        rows: what is there at the time.
    """
    for part in grid.parts:
        for lr in part.lrs:
            for method in grid.methods:
                yield make(part, method, lr, part.seeds[0])
        for seed in part.seeds[1:]:
            for method in grid.methods:
                best = best_lr(rows(), part, method)
                if best is not None:
                    yield make(part, method, best, seed)


def best_lr(rows: list[Row], part: Part, method: str) -> float | None:
    """The best run's rate at the first seed; None unless all rates are there."""
    tried = {row["lr"] for row in _first_seed(rows, part, method)}
    best = best_so_far(rows, part, method)
    return best["lr"] if best and set(part.lrs) <= tried else None


def best_so_far(rows: list[Row], part: Part, method: str) -> Row | None:
    """The run of least `shortfall` at the first seed, whatever rates are there."""
    # A run that diverged has no loss.
    good = [row for row in _first_seed(rows, part, method) if row.get("valid_loss") is not None]
    return min(good, key=shortfall, default=None)


def shortfall(row: Row) -> float:
    """What the best rate has least of: wrong answers, mean of the lengths; without any, the loss.

    Training's held-out rows of associative recall may have any number of pairs, the task's have
    all, and methods that drop keys differ in which of the two they do better.
    """
    if "lengths" in row:
        return 1.0 - statistics.fmean(at["accuracy"] for at in row["lengths"])
    return float(row["valid_loss"])


def _first_seed(rows: list[Row], part: Part, method: str) -> list[Row]:
    return [
        row
        for row in rows
        if row["part"] == part.name
        # Rows of times have no method.
        and (row.get("method"), row.get("seed")) == (method, part.seeds[0])
        and row["lr"] in part.lrs
        and "failed" not in row
    ]


def digest(value: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
