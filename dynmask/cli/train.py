"""``dynmask train``: a model from a recipe."""

from __future__ import annotations

import argparse
import os
import time
from typing import TYPE_CHECKING

from dynmask.cli import FAILED, OK
from dynmask.cli.console import Output

if TYPE_CHECKING:
    from dynmask.train.recipe import Recipe
    from dynmask.train.run import Result

STOPPED = 3

_EPILOG = """\
A run that was stopped goes on if the same command is given again. On several
GPUs: torchrun --no-python --nproc-per-node N dynmask train ... (DDP, or FSDP2
with --set fsdp=true).

exit codes:
  0    the run is complete
  1    the loss or the weights are no numbers, or an unexpected error
  2    bad input: an argument, the recipe, the data, or a folder of another run
  3    stopped by --minutes before the end, with a checkpoint
  130  interrupted
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recipe and where its data and results are."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML file, or the name of one of the package's recipes"
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="a folder of .txt and .jsonl files (.xz too), or a dataset; default the recipe's",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the run is kept")
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="stop after M minutes with a checkpoint"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change the recipe: lr=1e-3 model.keep=512 phases.0.steps=100",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that make batches; default 0 on a CPU, on a GPU up to 8 of its cores",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Train, and say how it went; 3 if the time was up before the end."""
    from transformers.utils import logging as transformers_logging

    from dynmask.train.recipe import Recipe
    from dynmask.train.run import train
    from dynmask.train.trainer import NonFiniteLossError

    # Its bars would run into ours.
    transformers_logging.disable_progress_bar()
    first = os.environ.get("RANK", "0") == "0"
    recipe = Recipe.load(arguments.recipe, settings=arguments.set)
    start = time.perf_counter()
    with output.progress("train") as progress:
        try:
            result = train(
                recipe,
                arguments.out,
                data=arguments.data,
                minutes=arguments.minutes,
                workers=_workers() if arguments.workers is None else arguments.workers,
                progress=progress,
            )
        except NonFiniteLossError as error:
            failure = str(error)
        else:
            failure = ""
    if failure:
        output.say(f"dynmask train: {failure}", style="bold red")
        if first:
            output.finish({"error": failure, "exit_code": FAILED})
        return FAILED
    if first:
        document = _document(arguments, recipe, result, time.perf_counter() - start)
        _print(output, document, result)
        output.finish(document)
    return OK if result.complete else STOPPED


def _workers() -> int:
    """Batches are made beside the GPU; on a CPU they would take the model's cores."""
    import torch

    if not torch.cuda.is_available():
        return 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(8, max(1, (os.cpu_count() or 2) // local - 2))


def _document(
    arguments: argparse.Namespace, recipe: Recipe, result: Result, seconds: float
) -> dict[str, object]:
    evaluations = [entry["eval_loss"] for entry in result.log if "eval_loss" in entry]
    return {
        "recipe": arguments.recipe,
        "out": arguments.out,
        "model": f"{arguments.out}/model" if result.complete else None,
        "complete": result.complete,
        "steps": result.steps,
        "of_steps": recipe.steps,
        "loss": result.last("loss"),
        "eval_loss_first": evaluations[0] if evaluations else None,
        "eval_loss": evaluations[-1] if evaluations else None,
        "eval_answers": result.last("eval_answers"),
        "tokens_per_second": result.last("tokens_per_second"),
        "mfu": result.last("mfu"),
        "peak_flops": result.peak,
        "devices": result.devices,
        "seconds": round(seconds, 1),
    }


def _print(output: Output, document: dict[str, object], result: Result) -> None:
    rows = [["steps", f"{document['steps']:,} of {document['of_steps']:,}"]]
    for name, key in (
        ("loss", "loss"),
        ("held-out loss, first", "eval_loss_first"),
        ("held-out loss, last", "eval_loss"),
    ):
        if document[key] is not None:
            rows.append([name, f"{document[key]:.4f}"])
    if document["eval_answers"] is not None:
        rows.append(["held-out answers", f"{100 * result.last('eval_answers'):.1f} %"])
    if document["tokens_per_second"] is not None:
        rows.append(["tokens a second", f"{document['tokens_per_second']:,.0f}"])
    if document["mfu"] is not None:
        mfu, peak = result.last("mfu"), result.peak / 1e12
        text = f"{100 * mfu:.1f} % of {peak:,.3g} TFLOP/s, a measured matrix product"
        rows.append(["MFU", text])
    rows += [["on", result.devices], ["seconds", f"{document['seconds']:,}"]]
    output.table("", ["figure", "value"], rows, left=2)
    if document["model"]:
        output.say(f"Wrote {document['model']}.")
    else:
        output.say("Stopped by --minutes; the same command goes on from the checkpoint.")
