"""Inference time of the models of mqar.py, all methods of a part in turn in one process.

    python benchmarks/trained/mqar_times.py --runs runs --only part="d128, 512 pairs"

Of each method the run of best accuracy so far at the first seed is taken: its model in --runs, or
one of its recipe with initial weights if there is none, which is noted. The times of a part are a
line of --out. Nothing else may run on the GPU meanwhile.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
import transformers
from cells import DEVICE, Runner, append, arguments, free, loaded, surroundings
from grid import Cell, Grid, Part, Row, best_so_far, digest
from jobs import begin
from mqar import SEED

from dynmask.bench.timing import Clock, Run, measure
from dynmask.train.models import build_model
from dynmask.train.mqar import Mqar, Recall
from dynmask.train.source import Step

USED = 2 << 30
"""Bytes on a GPU, before a model is there, that only another process can have taken."""


def found(runner: Runner, part: Part) -> tuple[dict[str, Cell], dict[str, str]]:
    """The best runs of a part, by method, and why others are left out."""
    cells, missing = {}, {}
    for method in runner.grid.methods:
        run = best_so_far(runner.rows, part, method)
        lr, seed = run["lr"] if run else "", part.seeds[0]
        if not runner.wanted(part=part.name, method=method, lr=lr, seed=seed):
            continue
        if run is None:
            missing[method] = "no finished run"
        else:
            cells[method] = runner.grid.cell(
                runner.folder, part, method, run["lr"], seed, free=runner.args.set
            )
    return cells, missing


def is_trained(runner: Runner, cell: Cell) -> bool:
    """Whether the model of a run is there."""
    return (runner.runs / cell.key / "model").is_dir()


def model_of(runner: Runner, cell: Cell) -> Any:
    """The trained model of a run, or one of its recipe with initial weights."""
    if is_trained(runner, cell):
        return loaded(runner.runs / cell.key / "model")[0]
    model = build_model(cell.recipe, vocab_size=task_of(cell).vocab_size)
    return model.to(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32).eval()


def task_of(cell: Cell) -> Mqar:
    """What its rows hold, with as many pairs as fit."""
    assert isinstance(cell.recipe.data, Mqar)
    return dataclasses.replace(cell.recipe.data, fewest=None)


def timed(models: dict[str, Any], task: Mqar, length: int, *, tokens: int, rounds: int) -> Row:
    """Time of one forward pass over so many tokens in rows of a length; logits of the last one.

    Args:
        models: by method; they take turns.
        task: what rows hold.
        length: tokens of a row.
        tokens: of a pass.
        rounds: passes of each model.
    """
    rows = max(1, tokens // length)
    ids = torch.from_numpy(Recall(task).at(Step(0, 0, 0, rows, length, SEED)).ids).to(DEVICE)
    calls = {}
    failed = {}
    for method, model in models.items():
        call = partial(model, input_ids=ids, use_cache=False, logits_to_keep=1)
        try:
            call()
            calls[method] = Run(call)
        except (ValueError, RuntimeError) as error:
            failed[method] = f"{type(error).__name__}: {str(error)[:300]}"
    clock = Clock(torch.device(DEVICE))
    times = measure(calls, clock, rounds=rounds, warmups=3, budget=2.0)
    row: Row = {"length": length, "batch": rows}
    row["seconds"] = {method: one.to_dict() for method, one in times.items()}
    return row | ({"failed": failed} if failed else {})


def row_of(runner: Runner, part: Part, cells: dict[str, Cell]) -> Row:
    """The times of a part at every length."""
    grid = runner.grid
    models = {method: model_of(runner, cell) for method, cell in cells.items()}
    task = task_of(next(iter(cells.values())))
    with torch.no_grad():
        times = [timed(models, task, at, **grid.times) for at in grid.evaluation["lengths"]]
    return {
        "experiment": grid.experiment,
        "part": part.name,
        "runs": {
            method: {"run": cell.key, "lr": cell.recipe.lr, "seed": cell.recipe.seed}
            for method, cell in cells.items()
        },
        "initial": [method for method, cell in cells.items() if not is_trained(runner, cell)],
        "times": times,
        "environment": surroundings(runner.args),
    }


def work(runner: Runner) -> None:
    """Time all parts that have runs and are not there yet."""
    for part in runner.grid.parts:
        cells, missing = found(runner, part)
        for method, why in missing.items():
            print(f"{part.name} {method}: {why}; left out")
        if not cells:
            continue
        keys = {method: [cell.key, is_trained(runner, cell)] for method, cell in cells.items()}
        key = digest([part.name, keys, runner.grid.evaluation["lengths"], runner.grid.times])
        if runner.has(key):
            print(f"{part.name}: the times of these models are there")
            continue
        row = row_of(runner, part, cells) | {"key": key, "missing": missing}
        append(runner.args.out, row)
        free()
        for at in row["times"]:
            each = (f"{m} {1e3 * s['median']:.2f} ms" for m, s in at["seconds"].items())
            print(f"{part.name} {at['length']}: {', '.join(each)}", flush=True)


def main() -> None:
    parser = arguments("mqar", __doc__ or "")
    args = parser.parse_args()
    if args.data or args.jobs != 1:
        parser.error("models are timed one after the other and need no text: leave both out")
    if DEVICE == "cuda":
        idle, total = torch.cuda.mem_get_info()
        if total - idle > USED:
            parser.error(f"another process has {(total - idle) / 2**30:.1f} GiB of the GPU")
    transformers.utils.logging.disable_progress_bar()
    begin(args)
    work(Runner(Grid.load(args.grid), args.grid.parent, args))


if __name__ == "__main__":
    main()
