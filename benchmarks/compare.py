"""Training-free methods on the same models, prompts and engine, at equal measured density.

python benchmarks/compare.py --checkpoint embedded --device cuda --budget-seconds 540
python benchmarks/compare.py --page docs/results/compare.md

A finished cell is a line of --out at once; a second start leaves out what is there.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from compare_methods import Method, attached, calibrated
from compare_tasks import Asker, Outcome, Task, Texts

import dynmask
from dynmask.assets import load_texts
from dynmask.bench.environment import commit
from dynmask.cli.inputs import load, read_texts
from dynmask.eval.result import wilson
from dynmask.eval.runner import context_length, encode
from dynmask.hf.fingerprint import fingerprint

ROOT = Path(__file__).parents[1]


class OutOfTime(Exception):
    """The budget is spent."""


@dataclass(frozen=True)
class Settings:
    """What a configuration file holds; see benchmarks/compare/all.yaml."""

    seed: int
    calibration: dict[str, Any]
    densities: tuple[float, ...]
    least: float
    tasks: tuple[Task, ...]
    methods: tuple[Method, ...]
    moa: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Settings:
        """Read a file."""
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return cls(
            seed=raw["seed"],
            calibration=raw["calibration"],
            densities=tuple(raw["densities"]),
            least=raw["least"],
            tasks=tuple(Task.read(name, task) for name, task in raw["tasks"].items()),
            methods=tuple(Method.read(name, method) for name, method in raw["methods"].items()),
            moa=raw["moa"],
        )


@dataclass(frozen=True)
class Cell:
    """One figure to be had: a task under a method at a target; no method is full attention."""

    task: Task
    method: Method | None
    target: float

    @property
    def label(self) -> str:
        """What stands in the method's column."""
        return "full" if self.method is None else self.method.name


def cells(settings: Settings, task: Task) -> Iterator[Cell]:
    """All cells of a task: full attention, methods with values of their own, then by density."""
    yield Cell(task, None, 1.0)
    chosen = [m for m in settings.methods if task.path in m.paths]
    for method in chosen:
        only = method.only if task.path == "decode" and method.only is not None else method.values
        for value in only:
            yield Cell(task, method, value)
    for density in settings.densities if task.densities is None else task.densities:
        for method in chosen:
            if not method.values:
                yield Cell(task, method, density)


class Comparison:
    """Fills one file with the cells of one checkpoint."""

    def __init__(
        self,
        settings: Settings,
        out: Path,
        *,
        name: str,
        model: Any,
        tokenizer: Any,
        texts: Texts,
        deadline: float,
    ):
        self.settings, self.out, self.name = settings, out, name
        self.model, self.tokenizer, self.texts = model, tokenizer, texts
        self.deadline = deadline
        self.weights = digest(fingerprint(model))
        self.context: dict[str, Any] = {}
        self.numbers: dict[tuple[str, float], float] = {}
        self.done = {row["key"] for row in read_rows(out) if "failed" not in row}
        self.full: dict[str, float] = {
            row["task"]["name"]: row["score"]
            for row in read_rows(out)
            if row.get("weights") == self.weights and row["method"] == "full" and "score" in row
        }

    def check(self) -> None:
        """Raise once the time is up."""
        if time.perf_counter() > self.deadline:
            raise OutOfTime

    def run(self, tasks: list[Task], methods: set[str]) -> None:
        """Run every cell that is not there yet; stops with `OutOfTime`, nothing half written."""
        limit = context_length(self.model)
        for task in tasks:
            if limit is not None and task.length > limit:
                print(f"{task.name}: {task.length} tokens are over the context of {limit}")
                continue
            asker, probe = self._askers(task)
            for cell in cells(self.settings, task):
                if methods and cell.method is not None and cell.method.name not in methods:
                    continue
                key = self._key(cell)
                if key in self.done:
                    continue
                if cell.method is not None and self._hopeless(task):
                    break
                self.check()
                row = self._head(cell) | {"key": key} | self._filled(cell, asker, probe)
                append(self.out, row)
                if cell.method is None and "score" in row:
                    self.full[task.name] = row["score"]
                print(line(row), flush=True)

    def _askers(self, task: Task) -> tuple[Asker, Asker]:
        given = self.model, self.tokenizer, self.texts
        return Asker(task, *given, self.settings.seed), Asker(
            task, *given, self.settings.calibration["seed"]
        )

    def _hopeless(self, task: Task) -> bool:
        """Whether the model itself cannot do the task, so that methods say nothing about it."""
        if task.run == "perplexity" or self.full.get(task.name, 1.0) >= self.settings.least:
            return False
        print(f"{task.name}: full attention gets {self.full[task.name]:.1%}; not compared")
        return True

    def _key(self, cell: Cell) -> str:
        """The same for the same figure: a finished cell is recognised by it."""
        method = None if cell.method is None else asdict(cell.method)
        calibration = None if cell.method is None else self.settings.calibration
        # Its name and which other densities it is asked at say nothing about a figure.
        task = asdict(cell.task) | {"name": "", "densities": None}
        parts = [self.weights, task, method, cell.target, self.settings.seed]
        return digest([*parts, calibration])

    def _head(self, cell: Cell) -> dict[str, Any]:
        device = next(self.model.parameters()).device
        gpu = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
        return {
            "checkpoint": self.name,
            "weights": self.weights,
            "task": asdict(cell.task) | {"path": cell.task.path},
            "method": cell.label,
            "target": cell.target,
            "of_values": bool(cell.method and cell.method.values),
            "seed": self.settings.seed,
            "calibration": self.settings.calibration,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": gpu,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "versions": {
                "dynmask": dynmask.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "commit": commit(),
        }

    def _filled(self, cell: Cell, asker: Asker, probe: Asker) -> dict[str, Any]:
        try:
            if cell.method is None:
                return self._measured(cell, asker, {})
            settings, calibration = self._set(cell, cell.method, probe)
            if calibration.get("density", 0.0) > 1.25 * cell.target and not cell.method.values:
                reached = calibration["density"]
                return {"settings": settings, "skipped": f"no setting under {reached:.3f} density"}
            return self._measured(cell, asker, settings) | {"calibrated": calibration}
        except (ValueError, torch.cuda.OutOfMemoryError) as error:
            # One method that cannot run must not cost the others.
            return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}

    def _set(
        self, cell: Cell, method: Method, probe: Asker
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings of the method for the cell's target, by its density on other prompts."""
        if method.values:
            return method.given(cell.target), {}
        start = time.perf_counter()
        length, target = cell.task.length, cell.target
        if method.policy == "capped":
            return {"cap": round(target * length), **method.settings}, {}
        self._profile(method)
        prompts = method.probes or self.settings.calibration["prompts"]

        def density(number: float) -> float:
            self.check()
            with attached(method, self.model, method.given(number), self.context) as run:
                probe.probe(self.check, prompts, self._cache(method, run, {}))
            return float(run.stats()["density"].get(cell.task.path, 1.0))

        low, high = method.range
        # A window of so many keys has the target as its density.
        of_length = target if cell.task.path == "decode" else 1 - (1 - target) ** 0.5
        # A share that served another task is near this one's.
        near = self.numbers.get((method.name, target)) if method.share else of_length * length
        found = calibrated(
            density,
            target,
            low=low,
            high=length if high is None else high,
            share=method.share,
            guess=near,
            tolerance=self.settings.calibration["tolerance"],
            steps=self.settings.calibration["steps"],
        )
        self.numbers[method.name, target] = found.number
        spent = round(time.perf_counter() - start, 2)
        return method.given(found.number), {
            "density": found.density,
            "tried": found.tried,
            "seconds": spent,
        }

    def _profile(self, method: Method) -> None:
        if method.policy != "moa" or "windows" in self.context:
            return
        moa = self.settings.moa
        ids = [encode(self.tokenizer, text) for text in load_texts("calibration")]
        rng = random.Random(self.settings.calibration["seed"])
        self.context["lengths"] = moa["lengths"]
        self.context["windows"] = [
            [cut(rng, ids, length) for _ in range(moa["windows"])] for length in moa["lengths"]
        ]

    def _cache(self, method: Method | None, run: Any, settings: dict[str, Any]) -> Any:
        """What makes the caches of decoded tasks; None leaves them to transformers."""
        if method is not None and method.policy == "capped":
            return lambda: run.cache(settings["cap"])
        if method is not None and method.policy == "dynamic":
            return run.cache
        return transformers.DynamicCache if method is not None and method.whole else None

    def _measured(self, cell: Cell, asker: Asker, settings: dict[str, Any]) -> dict[str, Any]:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        stats: dict[str, Any] = {}
        if cell.method is None:
            outcome = asker.ask(self.check)
        else:
            with attached(cell.method, self.model, settings, self.context) as run:
                cache = self._cache(cell.method, run, settings)
                given = {"n": cell.method.n, "cache": cache, "whole": cell.method.whole}
                outcome = asker.ask(self.check, **given)
            stats = run.stats()
        density = stats.get("density", {cell.task.path: 1.0})
        if cell.method is not None and cell.method.policy == "capped":
            # Rows run dense over the slots that there are.
            density = density | {"decode": min(1.0, settings["cap"] / outcome.tokens)}
        return {
            "settings": settings,
            "density": density,
            "impl": stats.get("impl", {}),
            "mask_seconds": round(stats.get("mask_seconds", 0.0), 3),
            "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            **scored(outcome),
        }


def scored(outcome: Outcome) -> dict[str, Any]:
    """An outcome as it is kept: marks as one digit a question, losses as numbers."""
    kept: dict[str, Any] = {
        "n": len(outcome.marks),
        "strings": outcome.strings,
        "tokens": round(outcome.tokens, 1),
        "prompts": outcome.prompts,
        "seconds": round(outcome.seconds, 3),
    }
    if not outcome.strings:
        nll = sum(outcome.marks) / len(outcome.marks)
        # The exponential is for the reader; figures are compared by the losses.
        return kept | {"score": round(float(torch.tensor(nll).exp()), 4), "losses": outcome.marks}
    total = sum(outcome.marks) / outcome.strings
    return kept | {
        "score": total / len(outcome.marks),
        "interval": wilson(total, len(outcome.marks)),
        "marks": "".join(str(int(mark)) for mark in outcome.marks),
        "tenths": "".join(str(min(int(10 * depth), 9)) for depth in outcome.depths),
    }


def cut(rng: random.Random, texts: list[list[int]], length: int) -> list[int]:
    """A random window of the texts' ids, end to end."""
    ids = [token for text in texts for token in text]
    start = rng.randrange(len(ids) - length)
    return ids[start : start + length]


def digest(value: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def append(path: Path, row: dict[str, Any]) -> None:
    """Write a row as a line of its own, also behind one that was interrupted."""
    whole = not path.exists() or path.read_bytes()[-1:] in (b"\n", b"")
    with path.open("a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The cells in a file; a last line that was interrupted is left out."""
    rows = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(text))
            except json.JSONDecodeError:
                continue
    return rows


def line(row: dict[str, Any]) -> str:
    """One cell for the screen."""
    head = f"{row['checkpoint']:10} {row['task']['name']:14} {row['method']:14} {row['target']:<5g}"
    for name in ("failed", "skipped"):
        if name in row:
            return f"{head} {name}: {row[name]}"
    shown = f"{row['score']:.3f}" if not row["strings"] else f"{100 * row['score']:5.1f} %"
    density = " ".join(f"{kind} {value:.3f}" for kind, value in row["density"].items())
    tried = row.get("calibrated", {}).get("seconds", 0)
    return (
        f"{head} {shown} of {row['n']:<4} density {density}  {row['seconds']:.1f} s, masks "
        f"{row['mask_seconds']:.1f} s, calibration {tried:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks/compare/all.yaml")
    parser.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a model; 'embedded' needs no folder; may be repeated",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/compare.jsonl")
    parser.add_argument("--tasks", nargs="+", default=[], help="only these")
    parser.add_argument("--methods", nargs="+", default=[], help="only these, and full attention")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--haystack", nargs="+", help="text files instead of the embedded ones")
    parser.add_argument("--perplexity", nargs="+", help="likewise, for perplexity")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    parser.add_argument("--page", type=Path, help="make the page of what is in --out, and no more")
    args = parser.parse_args()
    if args.page:
        from compare_page import write_page

        write_page(read_rows(args.out), args.page)
        return
    deadline = time.perf_counter() + args.budget_seconds
    settings = Settings.load(args.config)
    unknown = {*args.tasks} - {task.name for task in settings.tasks}
    unknown |= {*args.methods} - {method.name for method in settings.methods}
    if unknown:
        parser.error(f"{args.config.name} has no {', '.join(sorted(unknown))}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    texts = Texts(
        read_texts(args.haystack) if args.haystack else load_texts("haystack"),
        read_texts(args.perplexity) if args.perplexity else load_texts("perplexity"),
    )
    tasks = [task for task in settings.tasks if not args.tasks or task.name in args.tasks]
    try:
        for given in args.checkpoint or ["embedded"]:
            name, _, folder = given.partition("=")
            loaded = load(folder or name, device=args.device, dtype=args.dtype)
            Comparison(
                settings,
                args.out,
                name=name,
                model=loaded.model,
                tokenizer=loaded.tokenizer,
                texts=texts,
                deadline=deadline,
            ).run(tasks, set(args.methods))
    except OutOfTime:
        print("the budget is spent; the same command goes on")
        return
    print("all cells are there")


if __name__ == "__main__":
    main()
