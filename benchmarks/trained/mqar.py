"""Multi-query associative recall by trained attention: accuracy by length.

    python benchmarks/trained/mqar.py --jobs 5 --budget-seconds 520 --only part="d128, 512 pairs"

A finished cell is a line of --out at once; the same command goes on where it ended, in the middle
of a training run, too. Trained models stay in --runs, for mqar_times.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from functools import partial
from typing import Any

import torch
from cells import DEVICE, Runner, arguments, parameters
from grid import Cell, Grid, Row
from jobs import go

from dynmask.train.mqar import Mqar, Recall
from dynmask.train.source import Step
from dynmask.train.trainer import answer_counts

SEED = 9_999_991
"""Of the test's rows: neither a run's nor that of its held-out rows."""


def accuracy(model: Any, task: Mqar, length: int, *, rows: int, tokens: int) -> Row:
    """Share of values that are the arg max over the whole vocabulary, mean of rows.

    Args:
        model: a causal language model.
        task: what rows hold.
        length: tokens of a row.
        rows: how many.
        tokens: of one forward pass.
    """
    source = Recall(task)
    each = max(1, min(rows, tokens // length))
    shares: list[float] = []
    for number in range(-(-rows // each)):
        batch = source.at(Step(number, 0, number, each, length, SEED))
        ids = torch.from_numpy(batch.ids).to(DEVICE)
        weights = torch.from_numpy(batch.weights).to(DEVICE)
        counts = answer_counts(
            model(input_ids=ids, use_cache=False).logits, ids, weights, answer=source.answer
        )
        shares += (counts[:, 0] / counts[:, 1]).tolist()
    shares = shares[:rows]
    return {
        "length": length,
        "pairs": min(task.pairs, length // 4),
        "rows": len(shares),
        "accuracy": round(statistics.fmean(shares), 5),
        "error": round(statistics.stdev(shares) / len(shares) ** 0.5, 5),
    }


def evaluate(model: Any, tokenizer: Any, cell: Cell, *, evaluation: dict[str, Any]) -> Row:
    """Accuracy at every length."""
    task = cell.recipe.data
    assert isinstance(task, Mqar)
    task = dataclasses.replace(task, fewest=None)
    lengths = [
        accuracy(model, task, at, rows=evaluation["rows"], tokens=evaluation["tokens_per_call"])
        for at in evaluation["lengths"]
    ]
    note = " ".join(f"{x['length']}: {100 * x['accuracy']:.1f} %" for x in lengths)
    return {
        "parameters": parameters(model),
        "implementation": model.config._attn_implementation,
        "lengths": lengths,
        "note": note,
    }


def work(args: argparse.Namespace) -> None:
    """What one process does."""
    grid = Grid.load(args.grid)
    measured = partial(evaluate, evaluation=grid.evaluation)
    Runner(grid, args.grid.parent, args).run(measured, keep=True)


def main() -> None:
    parser = arguments("mqar", __doc__ or "")
    args = parser.parse_args()
    if args.data:
        parser.error("the rows are generated: leave --data out")
    go(args, work)


if __name__ == "__main__":
    main()
