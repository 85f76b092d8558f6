"""Perplexity of models that differ in their attention alone, by size, at equal tokens and data.

    python benchmarks/trained/scaling.py --data BOOKS --texts BOOKS/test.jsonl.xz --runs runs \
        --budget-seconds 560 --only part=10M

BOOKS holds train* and valid* files; the rate is chosen on the latter, the figure is that of
--texts. A finished cell is a line of --out at once; the same command goes on where it ended.
Trained models stay in --runs, for past.py.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from cells import Runner, arguments, parameters
from grid import Cell, Grid, Row
from jobs import go

from dynmask.cli.inputs import read_texts
from dynmask.eval import perplexity


def evaluate(
    model: Any, tokenizer: Any, cell: Cell, *, texts: list[str], evaluation: dict[str, Any]
) -> Row:
    """Perplexity as `dynmask eval perplexity` measures it."""
    result = perplexity(
        model,
        tokenizer,
        texts,
        length=evaluation["length"],
        windows=evaluation["windows"],
    )
    kept = result.to_json()
    # By position the metrics say as much; the windows' losses are for paired comparisons.
    kept["rows"] = [round(row["nll"], 6) for row in kept["rows"]]
    del kept["parts"]
    bits = result.metrics["bits_per_byte"]
    return {
        "parameters": parameters(model),
        "implementation": model.config._attn_implementation,
        "perplexity": kept,
        "note": f"perplexity {result.score:.3f}, {bits:.4f} bits a byte",
    }


def work(args: argparse.Namespace) -> None:
    """What one process does."""
    grid = Grid.load(args.grid)
    measured = partial(evaluate, texts=read_texts(args.texts), evaluation=grid.evaluation)
    Runner(grid, args.grid.parent, args).run(measured, keep=True)


def main() -> None:
    parser = arguments("scaling", __doc__ or "")
    parser.add_argument("--texts", nargs="+", help="test texts, no book of --data")
    args = parser.parse_args()
    if not args.data or not args.texts:
        parser.error("--data (a folder of books) and --texts (other books) are needed")
    go(args, work)


if __name__ == "__main__":
    main()
