"""``dynmask report``: a plan and what was measured with it, or two plans, as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from dynmask.cli import OK
from dynmask.cli.console import Output
from dynmask.cli.inputs import check_writable, write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --plan, --compare, --results and --out."""
    parser.add_argument("--plan", required=True, metavar="FOLDER", help="a calibrated plan")
    parser.add_argument(
        "--compare",
        metavar="FOLDER",
        help="a second plan of as many layers and heads, to set beside the first",
    )
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="FILE.json",
        help="files of 'dynmask demo' or 'dynmask eval --out'",
    )
    parser.add_argument("--out", required=True, metavar="FILE.html", help="the page to write")


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Build the page and write it."""
    from dynmask.dam import MaskPlan
    from dynmask.report import Results, build_page, merge

    target = check_writable(arguments.out)
    plan = MaskPlan.load(arguments.plan)
    compare = MaskPlan.load(arguments.compare) if arguments.compare else None
    documents = [Results.load(path) for path in arguments.results]
    page = build_page(
        plan,
        merge(documents) if documents else None,
        compare=compare,
        names=plan_names(arguments.plan, arguments.compare or ""),
    )
    write_text(target, page)
    size = target.stat().st_size
    output.say(f"Wrote {target} ({size / 2**20:.1f} MiB). Open it in any browser.")
    output.finish({"report": str(target), "bytes": size})
    return OK


def plan_names(first: str, second: str) -> tuple[str, str]:
    """Return the folders' own names, or both paths as they were given where the names are equal."""
    names = Path(first).absolute().name, Path(second).absolute().name
    return (first, second) if names[0] == names[1] else names
