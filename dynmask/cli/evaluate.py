"""``dynmask eval``: one task, one model, one mode."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dynmask.cli import OK, add_common
from dynmask.cli.console import Output, Report
from dynmask.cli.inputs import Loaded, add_model_arguments, check_writable, load, read_texts
from dynmask.cli.methods import add_cache_arguments, add_method_arguments, policy_of

if TYPE_CHECKING:
    from transformers import Cache

    from dynmask.hf import Run

#: Written out, so that the parser need not import torch; a test compares them with the tasks'.
RULER_KINDS = (
    *("single_1", "single_2", "single_3", "multikey", "multikey_2", "multikey_3"),
    *("multivalue", "multiquery", "vt", "fwe"),
)
RECALL_KINDS = ("lines", "minference", "ruler", "multikey", "multikey_2", "vt", "keyvalue")
PAIR_FORMS = ("uuid", "digits", "words")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand for each task, with that task's options."""
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    lines = _task(tasks, "longeval", "find the number of a line in a record of lines")
    add_cache_arguments(lines)
    lines.add_argument("--lines", type=int, default=200, help="lines of a record; default 200")
    lines.add_argument("--n", type=int, default=50, help="questions in all; default 50")
    lines.add_argument(
        "--questions", type=int, default=10, help="questions that share a prefill; default 10"
    )
    lines.add_argument("--seed", type=int, default=0, help="default 0")
    lines.add_argument("--form", choices=["completion", "official", "base"], default="completion")
    lines.add_argument("--cases", metavar="FILE", help="an official *_lines.jsonl file to read")

    needle = _task(tasks, "needle", "find a number hidden in running text")
    add_cache_arguments(needle)
    needle.add_argument("--length", type=int, default=8192, help="tokens of a prompt; default 8192")
    needle.add_argument("--n", type=int, default=50, help="questions in all; default 50")
    needle.add_argument(
        "--needles", type=int, default=5, help="needles that share a prefill; default 5"
    )
    needle.add_argument("--seed", type=int, default=0, help="default 0")
    needle.add_argument("--form", choices=["minference", "ruler"], default="minference")
    _add_texts(needle)

    ruler = _task(tasks, "ruler", "RULER's tasks: needles among others, chains of names, counting")
    add_cache_arguments(ruler)
    _add_kind(ruler, RULER_KINDS, default="multikey")
    ruler.add_argument("--length", type=int, default=8192, help="tokens of a prompt; default 8192")
    ruler.add_argument("--n", type=int, default=50, help="questions in all; default 50")
    ruler.add_argument(
        "--questions",
        type=int,
        default=1,
        help="questions that share a prefill; default 1, as published; more are also harder",
    )
    ruler.add_argument("--seed", type=int, default=0, help="default 0")
    _add_texts(ruler)

    pairs = _task(tasks, "keyvalue", "find the value of a key in a JSON object")
    add_cache_arguments(pairs)
    _add_pairs(pairs, default="uuid")
    pairs.add_argument("--n", type=int, default=50, help="questions in all; default 50")
    pairs.add_argument(
        "--questions", type=int, default=10, help="questions that share a prefill; default 10"
    )
    pairs.add_argument("--seed", type=int, default=0, help="default 0")

    recall = _task(tasks, "recall", "find facts from questions in the middle of a prompt")
    _add_kind(recall, RECALL_KINDS, default="lines")
    recall.add_argument("--lines", type=int, default=200, help="lines of a record; default 200")
    _add_pairs(recall, default="digits")
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

    policy = policy_of(arguments)
    mode = _mode(arguments) if policy is None else policy.name
    target = check_writable(arguments.out) if arguments.out else None
    plan = None
    if arguments.plan:
        from dynmask.dam import MaskPlan

        plan = MaskPlan.load(arguments.plan)
    loaded = load(arguments.model, device=arguments.device, dtype=arguments.dtype)
    attached = running(loaded.model, plan, mode, arguments.coverage, policy=policy)
    with output.progress(arguments.task) as progress, attached as active:
        result = _evaluate(arguments, loaded, _cache(arguments, active), progress)
        row = quality_row(result, mode, Cost.of(loaded.model, active))
    row.settings.update(_protocol(arguments), **({} if policy is None else policy.settings()))
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
    if row.density == 1 and mode in ("dynamic", "auto"):
        output.say("note: nothing was left out; prompts this short run dense in this mode")
    if mode == "full" and loaded.model.config.model_type == "dma":
        output.say("note: density does not count what a DMA model leaves out by itself")
    if row.decode is not None:
        output.say(f"decode steps: density {100 * row.decode:.1f} %", style="dim")
    for name, value in result.metrics.items():
        output.say(f"{name.replace('_', ' ')}: {value:,.6g}", style="dim")
    document = result.to_json()
    output.finish({**results.to_dict(), "parts": document["parts"], "metrics": document["metrics"]})
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
        help="quality of dynamic masks (0.985) and of the plan's gate (the plan's own)",
    )
    add_method_arguments(parser)
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


def _add_kind(parser: argparse.ArgumentParser, kinds: Sequence[str], *, default: str) -> None:
    # All kinds in braces, as argparse would show them, are one word of more than a line.
    parser.add_argument(
        "--kind",
        choices=kinds,
        default=default,
        metavar="KIND",
        help=f"{', '.join(kinds)}; default {default}",
    )


def _add_pairs(parser: argparse.ArgumentParser, *, default: str) -> None:
    parser.add_argument("--pairs", type=int, default=75, help="pairs of an object; default 75")
    parser.add_argument(
        "--form",
        choices=PAIR_FORMS,
        default=default,
        help="keys and values: uuid as published, digits four each, words and four digits; "
        f"default {default}",
    )


def _mode(arguments: argparse.Namespace) -> str:
    mode = arguments.mode or ("auto" if arguments.plan else "full")
    if mode == "static" and not arguments.plan:
        raise ValueError("--mode static needs --plan FOLDER; --mode dynamic runs without one")
    if mode == "full" and arguments.plan:
        raise ValueError("--mode full runs without a plan; leave --plan out, or use --mode dense")
    if mode == "full" and getattr(arguments, "max_cache_tokens", None) is not None:
        raise ValueError("--max-cache-tokens is for accelerated models; add --mode dynamic")
    if mode == "full" and getattr(arguments, "sparse_decode", False):
        raise ValueError("--sparse-decode is for accelerated models; add --mode dynamic")
    if getattr(arguments, "sparse_decode", False) and arguments.max_cache_tokens is not None:
        raise ValueError("steps over a capped cache see all of it; leave --sparse-decode out")
    if mode == "full" and arguments.coverage is not None:
        raise ValueError("--coverage is for dynamic masks and plans; add --mode dynamic")
    return str(mode)


def _cache(arguments: argparse.Namespace, run: Run | None) -> Callable[[], Cache] | None:
    """Return what makes the caches; None for transformers' own."""
    cap = getattr(arguments, "max_cache_tokens", None)
    if cap is not None:
        assert run is not None
        arguments.whole = True
        run.cache(cap)  # Says what is wrong with it before anything is computed.
        return lambda: run.cache(cap)
    if getattr(arguments, "sparse_decode", False):
        assert run is not None
        return run.cache
    return None


def _protocol(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return how prompts and questions met, as far as it was asked for."""
    asked = {
        name: getattr(arguments, name, None)
        for name in ("whole", "sparse_decode", "max_cache_tokens")
    }
    return {name: value for name, value in asked.items() if value}


def _evaluate(
    arguments: argparse.Namespace,
    loaded: Loaded,
    cache: Callable[[], Cache] | None,
    progress: Report,
) -> Any:
    from dynmask import eval as tasks

    task = getattr(tasks, arguments.task)
    # Options are named as the task's arguments.
    names = inspect.signature(task).parameters
    given = {name: value for name, value in vars(arguments).items() if name in names}
    given |= {"model": loaded.model, "tokenizer": loaded.tokenizer, "progress": progress}
    if "cache" in names:
        given["cache"] = cache
    if "texts" in names:
        purpose = "perplexity" if arguments.task == "perplexity" else "haystack"
        given["texts"] = _texts(arguments, purpose)
    return task(**given)


def _texts(arguments: argparse.Namespace, purpose: str) -> list[str]:
    if arguments.texts:
        return read_texts(arguments.texts)
    from dynmask.assets import load_texts

    return load_texts(purpose)
