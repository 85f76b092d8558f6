"""``dynmask inspect``: what is in a plan."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from dynmask.cli import OK
from dynmask.cli.console import Output

if TYPE_CHECKING:
    from dynmask.dam import MaskPlan

#: Lengths whose densities fit beside the other columns.
TABLE_LENGTHS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan and --length."""
    parser.add_argument("plan", metavar="PLAN", help="the plan's folder")
    parser.add_argument(
        "--length",
        type=int,
        nargs="+",
        default=[4096, 16384],
        metavar="TOKENS",
        help="lengths to give the density at; default 4096 16384",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Print the plan layer by layer."""
    from dynmask.dam import MaskPlan

    lengths: list[int] = arguments.length
    if min(lengths) < 1:
        raise ValueError(f"--length {min(lengths)}: must be at least 1 token")
    plan = MaskPlan.load(arguments.plan)
    density = {
        mode: {length: plan.density(length, mode) for length in lengths}
        for mode in ("static", "auto")
    }
    print_plan(output, plan, density["static"], lengths[:TABLE_LENGTHS])
    for length in lengths:
        output.say(
            f"density at {length:,} tokens: static {_percent(density['static'][length])}, "
            f"auto at most {_percent(density['auto'][length])}"
        )
    output.finish(
        {
            **plan.inspect(),
            "density": {
                mode: {str(length): float(at.mean()) for length, at in of_mode.items()}
                for mode, of_mode in density.items()
            },
        }
    )
    return OK


def print_plan(
    output: Output, plan: MaskPlan, static: dict[int, Tensor], lengths: Sequence[int]
) -> None:
    """Print a plan's origin, its settings and one table row for each layer.

    Args:
        output: Where to print.
        plan: The plan.
        static: Length to static density, `[n_layers, H]`.
        lengths: The lengths to show.
    """
    data, settings = plan.data, plan.settings.to_dict()
    output.say(f"{plan.fingerprint.get('architecture', 'a model')}, {plan.created}", style="bold")
    output.say(f"dynmask {plan.dynmask_version}", style="dim")
    output.say(
        f"{data['texts']} windows of text, {data['tokens']:,} tokens; {data['holdout']} held out, "
        f"the longest of {data['holdout_length']:,}; sha256 {data['sha256'][:16]}"
    )
    output.say(", ".join(f"{name} {value}" for name, value in settings.items()), style="dim")
    rows = []
    for row, (index, layer) in enumerate(plan.layers.items()):
        gated = int(layer.gate.sum())
        rows.append(
            [
                str(index),
                f"{gated} of {layer.heads}",
                _range([len(item) for item in layer.columns]),
                _range([len(item) for item in layer.offsets]),
                f"{100 * float(layer.coverage.mean()):.1f}",
                f"{100 * float(layer.tail_coverage.mean()):.1f}",
                *(f"{100 * float(static[length][row].mean()):.1f}" for length in lengths),
            ]
        )
    columns = ["layer", "gated\nheads", "columns", "offsets", "coverage\n%", "worst\nrows %"]
    columns += [f"density\n% {length}" for length in lengths]
    output.table("", columns, rows)
    gated = sum(int(layer.gate.sum()) for layer in plan.layers.values())
    heads = sum(layer.heads for layer in plan.layers.values())
    output.say(f"in mode auto {heads - gated} of {heads} heads are static, {gated} (gated) dynamic")


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}–{high}"


def _percent(density: Tensor) -> str:
    return f"{100 * float(density.mean()):.1f} %"
