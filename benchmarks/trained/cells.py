"""Trains the cells of a grid and keeps each as a line of a file, which processes may share."""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from claims import claim, locked
from grid import Cell, Grid, Part, Row, digest, in_order
from jobs import OutOfTime
from transformers import AutoModelForCausalLM, AutoTokenizer

import dynmask.dma
import dynmask.train.variants  # noqa: F401  (makes its models known, as the line before)
from dynmask.bench.environment import environment
from dynmask.report.machine import usable_cores
from dynmask.train.prepare import prepare
from dynmask.train.run import train
from dynmask.train.trainer import NonFiniteLossError

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLL = 1.0
"""Seconds between two looks at what other processes do."""

Task = tuple[str, Callable[[], object]]
"""A key, and what makes the row of that key."""


class Runner:
    """Fills one file with the cells of one experiment.

    Args:
        grid: the experiment.
        folder: where its recipes lie.
        args: what `arguments` made, after `jobs.begin`.
    """

    def __init__(self, grid: Grid, folder: Path, args: argparse.Namespace):
        self.grid, self.folder, self.args = grid, folder, args
        self.only = chosen(args.only)
        self._read: tuple[Any, list[Row]] = (None, [])
        args.out.parent.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds; raises `OutOfTime` if there are none."""
        left: float = self.args.deadline - time.monotonic()
        if left <= 0:
            raise OutOfTime
        return left

    @property
    def rows(self) -> list[Row]:
        """What is there now, that of other processes too."""
        out: Path = self.args.out
        state = (out.stat().st_size, out.stat().st_mtime_ns) if out.exists() else None
        if state != self._read[0]:
            self._read = (state, read_rows(out))
        return self._read[1]

    def has(self, key: str) -> bool:
        """Whether a figure is there; one that failed is tried again."""
        return any(row["key"] == key and "failed" not in row for row in self.rows)

    def wanted(self, **names: Any) -> bool:
        """Whether --only leaves it in."""
        return all(str(names.get(name, "")) in values for name, values in self.only.items())

    def cells(self) -> Iterator[Cell]:
        """The grid's cells in order, as far as --only leaves them in."""

        def make(part: Part, method: str, lr: float, seed: int) -> Cell:
            return self.grid.cell(self.folder, part, method, lr, seed, free=self.args.set)

        for cell in in_order(self.grid, make, lambda: self.rows):
            lr, seed = cell.recipe.lr, cell.recipe.seed
            if self.wanted(part=cell.part, method=cell.method, lr=lr, seed=seed):
                yield cell

    def run(self, evaluate: Callable[[Any, Any, Cell], Row], *, keep: bool) -> None:
        """Train and measure every cell that is not there yet.

        Args:
            evaluate: gets model, tokenizer (None for data without text) and cell.
            keep: keep the trained model.

        Raises:
            OutOfTime: the budget is spent; the run in progress has a checkpoint.
        """

        def make(cell: Cell, key: str) -> None:
            row = self.trained(cell) | {"key": key}
            if "failed" not in row and "diverged" not in row:
                self.left()
                row |= self.measured(cell, evaluate)
            self.append(row)
            if "failed" not in row:
                shutil.rmtree(self.runs / cell.key) if not keep else tidy(self.runs / cell.key)

        def tasks() -> Iterator[Task]:
            for cell in self.cells():
                # The same recipes under other questions are other cells.
                key = digest([cell.key, self.grid.evaluation])
                yield key, partial(make, cell, key)

        self.fill(tasks)

    def fill(self, tasks: Callable[[], Iterable[Task]]) -> None:
        """Do what is not there and what no other process does, until nothing is left.

        What breaks is tried once in a start: by the process that took it.

        Args:
            tasks: in order; asked for again while other processes are at work, since what they
                find may bring new ones.

        Raises:
            OutOfTime: the budget is spent.
        """
        while True:
            waiting = False
            for key, do in tasks():
                if self.has(key):
                    continue
                with claim(self.runs / "claims" / key, self.args.start) as state:
                    waiting |= state == "taken"
                    if state == "mine" and not self.has(key):
                        do()
            if not waiting:
                return
            self.left()
            time.sleep(POLL)

    @property
    def runs(self) -> Path:
        """Where training runs lie."""
        runs: Path = self.args.runs
        return runs

    def measured(self, cell: Cell, evaluate: Callable[[Any, Any, Cell], Row]) -> Row:
        """What `evaluate` finds on the trained model; a failure costs this cell alone."""
        try:
            with torch.no_grad():
                model, tokenizer = loaded(self.runs / cell.key / "model")
                return evaluate(model, tokenizer, cell)
        except (ValueError, RuntimeError) as error:
            return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        finally:
            free()

    def trained(self, cell: Cell) -> Row:
        """Train a cell, or go on with it, and say how that went.

        Raises:
            OutOfTime: the budget is spent; there is a checkpoint.
        """
        folder = self.runs / cell.key
        head: Row = {
            "experiment": self.grid.experiment,
            "part": cell.part,
            "method": cell.method,
            "lr": cell.recipe.lr,
            "seed": cell.recipe.seed,
            "recipe": cell.named,
            "run": cell.key,
            "jobs": self.args.jobs,
            "compiled": cell.recipe.compile and DEVICE == "cuda",
            "environment": surroundings(self.args),
        }
        try:
            if not self.complete(cell):
                self._session(cell, folder)
        except NonFiniteLossError as error:
            return head | {"diverged": str(error).split(";")[0]}
        except (ValueError, RuntimeError) as error:
            return head | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        finally:
            free()
        return head | summary(cell, folder)

    def complete(self, cell: Cell) -> bool:
        """Whether it is trained."""
        folder = self.runs / cell.key
        return (folder / "model").is_dir() and (folder / "log.json").exists()

    def _session(self, cell: Cell, folder: Path) -> None:
        left = self.left()
        print(f"training {cell.part} {cell.method} lr {cell.recipe.lr} seed {cell.recipe.seed}")
        self._share_corpus(cell, folder)
        # Else what an earlier cell compiled counts against this one.
        torch.compiler.reset()
        start = time.perf_counter()
        result = train(
            cell.recipe,
            folder,
            data=str(self.args.data) if self.args.data else None,
            minutes=None if left == float("inf") else left / 60,
            workers=loaders(self.args.jobs),
        )
        sessions = read_sessions(folder)
        sessions.append(
            {
                "seconds": round(time.perf_counter() - start, 1),
                "steps": result.steps,
                "devices": result.devices,
                "peak_flops": result.peak,
            }
        )
        (folder / "sessions.json").write_text(json.dumps(sessions), encoding="utf-8")
        if not result.complete:
            raise OutOfTime

    def _share_corpus(self, cell: Cell, folder: Path) -> None:
        """Tokenise the text once for all cells."""
        if not self.args.data:
            return
        shared = self.runs / "corpus"
        shared.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "corpus").exists():
            (folder / "corpus").symlink_to(shared.resolve(), target_is_directory=True)
        with locked(self.runs / "claims" / "corpus"):
            prepare(cell.recipe, folder, path=str(self.args.data))
        self._same_text(cell, corpus_tokens(folder) or 0)

    def _same_text(self, cell: Cell, tokens: int) -> None:
        """Cells of one seed are compared with each other: they see the same text.

        Raises:
            SystemExit: the first that is kept saw another one.
        """
        for row in self.rows:
            alike = (row.get("part"), row.get("seed")) == (cell.part, cell.recipe.seed)
            if alike and "corpus_tokens" in row:
                if row["corpus_tokens"] != tokens:
                    raise SystemExit(
                        f"--data {self.args.data} has {tokens:,} tokens, and cells of seed "
                        f"{cell.recipe.seed} in {self.args.out} saw {row['corpus_tokens']:,}: give "
                        f"the same files, or another --out"
                    )
                return

    def append(self, row: Row) -> None:
        """Keep a figure.

        Raises:
            RuntimeError: it failed and left the GPU unusable to this process.
        """
        append(self.args.out, row)
        print(shown(row), flush=True)
        if "failed" in row and DEVICE == "cuda":
            # Else all cells after it would fail, too.
            torch.cuda.synchronize()


def surroundings(args: argparse.Namespace) -> Row:
    """Device, versions, commit and date."""
    made = environment(DEVICE)
    made["versions"]["transformers"] = transformers.__version__
    if args.commit:
        made["commit"] = args.commit
    return made


def loaders(jobs: int) -> int:
    """Processes that make a run's batches while so many runs share the cores."""
    return min(8, max(1, usable_cores() // jobs - 1)) if DEVICE == "cuda" else 0


def summary(cell: Cell, folder: Path) -> Row:
    """What a complete run says of itself."""
    log = json.loads((folder / "log.json").read_text(encoding="utf-8"))
    sessions = read_sessions(folder)

    def last(name: str) -> Any:
        return next((entry[name] for entry in reversed(log) if name in entry), None)

    tokens = cell.recipe.steps * cell.recipe.tokens_per_step
    made: Row = {
        "steps": cell.recipe.steps,
        "tokens": tokens,
        "loss": last("loss"),
        "valid_loss": last("eval_loss"),
        "tokens_per_second": last("tokens_per_second"),
        "mfu": last("mfu"),
        "train_seconds": round(sum(session["seconds"] for session in sessions), 1),
        "sessions": sessions,
        "curve": [
            [e["step"], e["loss"], *([e["answers_mqar"]] if "answers_mqar" in e else [])]
            for e in log
            if "loss" in e
        ],
    }
    corpus = corpus_tokens(folder)
    if corpus:
        made |= {"corpus_tokens": corpus, "epochs": round(tokens / corpus, 4)}
    return made


def corpus_tokens(folder: Path) -> int | None:
    """Tokens of a run's text, if there is one."""
    note = folder / "corpus" / "train" / "corpus.json"
    if not note.exists():
        return None
    width = np.dtype(json.loads(note.read_text(encoding="utf-8"))["dtype"]).itemsize
    return note.with_name("tokens.bin").stat().st_size // width


def read_sessions(folder: Path) -> list[Row]:
    """The sessions that a run took so far."""
    path = folder / "sessions.json"
    sessions: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return sessions


def loaded(folder: Path) -> tuple[Any, Any]:
    """A trained model, in bf16 on a GPU, and its tokenizer if it has one."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE).eval()
    has_text = (folder / "tokenizer.json").exists()
    return model, AutoTokenizer.from_pretrained(folder) if has_text else None


def parameters(model: Any) -> int:
    """Numbers that were trained."""
    return sum(parameter.numel() for parameter in model.parameters())


def free() -> None:
    """Give back the GPU memory of a model that is no longer used."""
    if DEVICE == "cuda":
        gc.collect()
        with suppress(RuntimeError):  # after an error of the device
            torch.cuda.empty_cache()


def tidy(folder: Path) -> None:
    """Leave the model of a complete run, not its checkpoints."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


def append(path: Path, row: Row) -> None:
    """Write a row as a line of its own, also behind one that was interrupted."""
    with locked(path):
        whole = path.read_bytes()[-1:] in (b"\n", b"")
        with path.open("a", encoding="utf-8") as file:
            file.write(("" if whole else "\n") + json.dumps(row) + "\n")


def read_rows(path: Path) -> list[Row]:
    """The cells in a file; a last line that was interrupted is left out."""
    rows = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                rows.append(json.loads(text))
    return rows


def shown(row: Row) -> str:
    """One cell for the screen."""
    head = f"{row['part']:18} {row['method']:4} lr {row['lr']:<7g} seed {row['seed']}"
    for name in ("failed", "diverged"):
        if name in row:
            return f"{head} {name}: {row[name]}"
    return f"{head} {row.get('note', '')}  {row['train_seconds']} s of training"


def chosen(only: list[str]) -> dict[str, set[str]]:
    """``["method=dma,nsa"]`` as names and values; numbers as Python writes them."""
    found = {}
    for text in only:
        name, _, values = text.partition("=")
        if name not in ("part", "method", "lr", "seed", "task", "length") or not values:
            raise SystemExit(f"--only {text}: write part=, method=, lr=, seed=, task= or length=")
        # A part's name may hold a comma and a space.
        given = values.replace(", ", "\0").split(",")
        found[name] = {_plain(value.replace("\0", ", ")) for value in given}
    return found


def _plain(value: str) -> str:
    try:
        return str(int(value))
    except ValueError:
        with suppress(ValueError):
            return str(float(value))
    return value


def arguments(experiment: str, about: str) -> argparse.ArgumentParser:
    """What all drivers take."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", type=Path, default=HERE / experiment / "grid.yaml")
    parser.add_argument("--out", type=Path, default=RESULTS / f"trained_{experiment}.jsonl")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="where runs in progress and models lie"
    )
    parser.add_argument("--data", type=Path, help="a folder with train*, valid* (not for mqar)")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    parser.add_argument(
        "--jobs", type=int, choices=range(1, 65), default=1, metavar="N", help="cells at once"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME=VALUE,...", help="method=dma,nsa lr=0.002"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="micro_tokens, compile and such"
    )
    parser.add_argument("--commit", help="to be noted where there is no history")
    return parser
