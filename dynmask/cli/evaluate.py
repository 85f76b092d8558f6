"""``dynmask eval``: one task, one model, one mode."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from typing import Any

from dynmask.cli import OK, add_common
from dynmask.cli.console import Output, Report
from dynmask.cli.inputs import Loaded, add_model_arguments, check_writable, load, read_texts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand for each task, with that task's options."""
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    lines = _task(tasks, "longeval", "find the number of a line in a record of lines")
    lines.add_argument("--lines", type=int, default=200, help="lines of a record; default 200")
    lines.add_argument("--n", type=int, default=50, help="questions in all; default 50")
    lines.add_argument(
        "--questions", type=int, default=10, help="questions that share a prefill; default 10"
    )
    lines.add_argument("--seed", type=int, default=0, help="default 0")
    lines.add_argument("--form", choices=["completion", "official", "base"], default="completion")
    lines.add_argument("--cases", metavar="FILE", help="an official *_lines.jsonl file to read")

    needle = _task(tasks, "needle", "find a number hidden in running text")
    needle.add_argument("--length", type=int, default=8192, help="tokens of a prompt; default 8192")
    needle.add_argument("--n", type=int, default=50, help="questions in all; default 50")
    needle.add_argument(
        "--needles", type=int, default=5, help="needles that share a prefill; default 5"
    )
    needle.add_argument("--seed", type=int, default=0, help="default 0")
    needle.add_argument("--form", choices=["minference", "ruler"], default="minference")
    _add_texts(needle)

    recall = _task(tasks, "recall", "find numbers from questions in the middle of a prompt")
    recall.add_argument("--kind", choices=["lines", "minference", "ruler"], default="lines")
    recall.add_argument("--lines", type=int, default=200, help="lines of a record; default 200")
    recall.add_argument(
        "--length", type=int, default=8192, help="tokens of a prompt with a haystack; default 8192"
    )
    recall.add_argument("--n", type=int, default=50, help="questions in all; default 50")
    recall.add_argument(
        "--questions", type=int, default=10, help="questions in a prompt; default 10"
    )
    recall.add_argument("--seed", type=int, default=0, help="default 0")
    recall.add_argument(
        "--filler", type=int, default=512, help="tokens after the last answer; default 512"
    )
    _add_texts(recall)

    perplexity = _task(tasks, "perplexity", "perplexity of windows of text")
    perplexity.add_argument(
        "--length", type=int, default=8192, help="tokens of a window; default 8192"
    )
    perplexity.add_argument("--windows", type=int, help="how many; default all the texts hold")
    _add_texts(perplexity)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Evaluate, print the row, and write it to --out if asked."""
    from dynmask.cli.tables import print_results
    from dynmask.report.machine import machine, versions
    from dynmask.report.measure import Cost, quality_row, running
    from dynmask.report.results import Results

    mode = _mode(arguments)
    target = check_writable(arguments.out) if arguments.out else None
    plan = None
    if arguments.plan:
        from dynmask.dam import MaskPlan

        plan = MaskPlan.load(arguments.plan)
    loaded = load(arguments.model, device=arguments.device, dtype=arguments.dtype)
    attached = running(loaded.model, plan, mode, arguments.coverage)
    with output.progress(arguments.task) as progress, attached as active:
        result = _evaluate(arguments, loaded, progress)
        row = quality_row(result, mode, Cost.of(loaded.model, active))
    results = Results(
        model=loaded.name,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        versions=versions(),
        quality=(row,),
    )
    if target:
        results.save(target)
    print_results(output, results)
    for name, value in result.metrics.items():
        output.say(f"{name.replace('_', ' ')}: {value:,.6g}", style="dim")
    output.finish({**results.to_dict(), "parts": result.to_json()["parts"]})
    return OK


def _task(tasks: Any, name: str, line: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = tasks.add_parser(
        name, help=line, description=line[0].upper() + line[1:] + "."
    )
    add_model_arguments(parser)
    parser.add_argument("--plan", metavar="FOLDER", help="run with this plan")
    parser.add_argument(
        "--mode",
        choices=["full", "dynamic", "static", "auto", "dense"],
        help="default: auto with --plan, else full (the model's own attention)",
    )
    parser.add_argument(
        "--coverage",
        type=float,
        help="quality of dynamic masks and of the plan's gate; default 0.98, or the plan's own",
    )
    parser.add_argument("--out", metavar="FILE.json", help="write the results for 'dynmask report'")
    add_common(parser, default=argparse.SUPPRESS)
    return parser


def _add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--texts",
        nargs="+",
        metavar="FILE",
        help='.txt, or .jsonl with "text"; either also with .xz; default: the embedded texts',
    )


def _mode(arguments: argparse.Namespace) -> str:
    mode = arguments.mode or ("auto" if arguments.plan else "full")
    if mode in ("static", "dense") and not arguments.plan:
        raise ValueError(f"--mode {mode} needs --plan FOLDER; --mode dynamic runs without one")
    if mode == "full" and arguments.plan:
        raise ValueError("--mode full runs without a plan; leave --plan out, or use --mode dense")
    if mode == "full" and arguments.coverage is not None:
        raise ValueError("--coverage is for dynamic masks and plans; add --mode dynamic")
    return str(mode)


def _evaluate(arguments: argparse.Namespace, loaded: Loaded, progress: Report) -> Any:
    from dynmask import eval as tasks

    model, tokenizer = loaded.model, loaded.tokenizer
    if arguments.task == "longeval":
        return tasks.longeval(
            model,
            tokenizer,
            lines=arguments.lines,
            n=arguments.n,
            questions=arguments.questions,
            seed=arguments.seed,
            form=arguments.form,
            cases=arguments.cases,
            progress=progress,
        )
    if arguments.task == "needle":
        return tasks.needle(
            model,
            tokenizer,
            _texts(arguments, "haystack"),
            length=arguments.length,
            n=arguments.n,
            needles=arguments.needles,
            seed=arguments.seed,
            form=arguments.form,
            progress=progress,
        )
    if arguments.task == "recall":
        return tasks.recall(
            model,
            tokenizer,
            _texts(arguments, "haystack"),
            kind=arguments.kind,
            lines=arguments.lines,
            length=arguments.length,
            n=arguments.n,
            questions=arguments.questions,
            seed=arguments.seed,
            filler=arguments.filler,
            progress=progress,
        )
    return tasks.perplexity(
        model,
        tokenizer,
        _texts(arguments, "perplexity"),
        length=arguments.length,
        windows=arguments.windows,
        progress=progress,
    )


def _texts(arguments: argparse.Namespace, purpose: str) -> list[str]:
    if arguments.texts:
        return read_texts(arguments.texts)
    from dynmask.assets import load_texts

    return load_texts(purpose)
