"""``dynmask calibrate``: texts and a model in, a plan out."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import time
from pathlib import Path

from dynmask.cli import OK
from dynmask.cli.console import Output
from dynmask.cli.inputs import Loaded, add_model_arguments, load, read_texts
from dynmask.dam import AMPLIFIERS, MaskPlan, Settings, check_writable

_HELP = {
    "capture_length": "tokens of each text; maps have this side",
    "amplify": f"one of {', '.join(AMPLIFIERS)}",
    "lam": "exponent of box-cox and yeo-johnson",
    "eps": "floor of a probability",
    "tau": "threshold on the amplified map",
    "mu": "share of a column or offset that must be in the mask",
    "support": "share of the rows that must show a column or offset",
    "coverage": "share of attention that a static head must keep",
    "coverage_length": "most tokens of a held-out text; several times the capture length",
    "holdout": "share of the tokens kept back to measure coverage",
    "seed": "of the split into calibration and held-out texts",
}
_TYPES = {"int": int, "float": float, "str": str}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the texts, the output and one option for each field of `Settings`."""
    add_model_arguments(parser)
    parser.add_argument(
        "--texts",
        nargs="+",
        metavar="FILE",
        help='.txt, or .jsonl with "text"; either also with .xz; default: the embedded texts',
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the plan goes")
    parser.add_argument("--batch-size", type=int, default=1, help="texts at a time; default 1")
    group = parser.add_argument_group("settings of the method")
    for field in dataclasses.fields(Settings):
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            type=_TYPES[str(field.type)],
            default=field.default,
            metavar=str(field.type).upper(),
            help=f"{_HELP.get(field.name, '')} (default: {field.default})".strip(),
        )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Calibrate, save, and print the plan."""
    from dynmask.cli.inspect import print_plan

    settings = Settings(
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)}
    )
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size {arguments.batch_size}: must be at least 1")
    target = Path(arguments.out)
    check_writable(target)
    texts = calibration_texts(arguments.texts)
    loaded = load(arguments.model, device=arguments.device, dtype=arguments.dtype)
    start = time.perf_counter()
    plan = calibrate_to(
        target, loaded, texts, settings=settings, batch_size=arguments.batch_size, output=output
    )
    seconds = time.perf_counter() - start
    length = settings.capture_length
    print_plan(output, plan, {length: plan.density(length, "static")}, [length])
    output.say(f"Wrote {target} in {seconds:.1f} s.")
    output.finish({"plan": str(target), "seconds": round(seconds, 3), **plan.inspect()})
    return OK


def calibration_texts(paths: list[str] | None) -> list[str]:
    """Return the texts of the files, or the embedded ones."""
    if paths:
        return read_texts(paths)
    from dynmask.assets import load_texts

    return load_texts("calibration")


def calibrate_to(
    target: Path,
    loaded: Loaded,
    texts: list[str],
    *,
    settings: Settings,
    batch_size: int,
    output: Output,
) -> MaskPlan:
    """Calibrate a model and save the plan.

    Finished layers are kept in a hidden folder beside the plan until it is saved; the same command
    after an interruption goes on from there.

    Args:
        target: The plan's folder.
        loaded: The model.
        texts: Calibration texts.
        settings: Parameters of the method.
        batch_size: Texts at a time.
        output: Where progress goes.

    Returns:
        The plan as it was saved.
    """
    from dynmask.hf import calibrate

    work = target.with_name(f".{target.name}.work")
    with output.progress("calibrate") as progress:
        plan: MaskPlan = calibrate(
            loaded.model,
            loaded.tokenizer,
            texts,
            batch_size=batch_size,
            work_folder=work,
            progress=progress,
            **settings.to_dict(),
        )
    plan.save(target)
    shutil.rmtree(work, ignore_errors=True)
    return plan
