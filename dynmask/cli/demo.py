"""``dynmask demo``: the main job from end to end on the embedded model."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dynmask.assets import load_texts
from dynmask.cli import OK
from dynmask.cli.calibrate import calibrate_to
from dynmask.cli.console import Output
from dynmask.cli.inputs import EMBEDDED, Loaded, check_writable, load, write_text
from dynmask.cli.tables import print_results
from dynmask.dam import MaskPlan, Settings
from dynmask.eval import Result, longeval, needle, perplexity, recall
from dynmask.eval.runner import encode_prefix
from dynmask.report import QualityRow, Results, SpeedRow, build_page
from dynmask.report.machine import machine, versions
from dynmask.report.measure import Cost, Progress, prefill_rows, quality_row, running

MODES = ("full", "static", "dynamic", "auto")


@dataclass(frozen=True)
class DemoSizes:
    """How much the demo does; sized for two cores and a few minutes.

    Attributes:
        capture_length: Tokens of each calibration text.
        batch_size: Calibration texts at a time.
        lines: Lines of a LongEval record.
        line_questions: LongEval questions in all.
        questions_per_record: LongEval questions that share a prefill.
        recall_questions: Questions inside a record's prompt, in all.
        needle_length: Tokens of a haystack.
        needle_questions: Needle questions in all.
        needles: Needles of a haystack, which share a prefill.
        perplexity_length: Tokens of a window.
        windows: Windows for perplexity.
        prefill_lengths: Prompt lengths to time, in tokens.
        repeats: Timed repeats of each mode and length.
        seed: Seed of every task.
    """

    capture_length: int = 1024
    batch_size: int = 1
    lines: int = 200
    line_questions: int = 40
    questions_per_record: int = 20
    recall_questions: int = 40
    needle_length: int = 8192
    needle_questions: int = 20
    needles: int = 10
    perplexity_length: int = 8192
    windows: int = 2
    prefill_lengths: tuple[int, ...] = (4096, 8192)
    repeats: int = 3
    seed: int = 1


DEFAULT = DemoSizes()
QUICK = DemoSizes(
    capture_length=256,
    lines=50,
    line_questions=10,
    questions_per_record=10,
    recall_questions=10,
    needle_length=2048,
    needle_questions=5,
    needles=5,
    perplexity_length=2048,
    windows=1,
    prefill_lengths=(2048,),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --out and --quick."""
    parser.add_argument(
        "--out", default="demo-out", metavar="FOLDER", help="default: demo-out, in this folder"
    )
    parser.add_argument(
        "--quick", action="store_true", help="smaller tasks: to see it work, not to measure"
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Calibrate, reload, measure in each mode, and write results and report."""
    sizes = QUICK if arguments.quick else DEFAULT
    folder = Path(arguments.out)
    check_writable(folder / "results.json")
    start = time.perf_counter()
    loaded = load(EMBEDDED, device="cpu")
    output.say(f"1  Calibrate the embedded model at {sizes.capture_length} tokens")
    calibrate_to(
        folder / "plan",
        loaded,
        load_texts("calibration"),
        settings=Settings(capture_length=sizes.capture_length),
        batch_size=sizes.batch_size,
        output=output,
    )
    plan = MaskPlan.load(folder / "plan")
    output.say("2  LongEval, recall, needles, perplexity: full, static, dynamic, auto")
    quality = []
    for mode in MODES:
        with output.progress(mode) as progress:
            quality += measure_quality(loaded, plan, mode, sizes=sizes, progress=progress)
    output.say("3  Time the prefill of each mode")
    with output.progress("prefill") as progress:
        speed = measure_speed(loaded, plan, sizes=sizes, progress=progress)
    results = Results(
        model=loaded.name,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        versions=versions(),
        quality=tuple(quality),
        speed=tuple(speed),
    )
    results.save(folder / "results.json")
    write_text(folder / "report.html", build_page(plan, results))
    seconds = time.perf_counter() - start
    output.say()
    print_results(output, results)
    output.say(
        f"Wrote {folder}/plan, results.json and report.html in {seconds:.0f} s. "
        "Open report.html in any browser."
    )
    output.finish({**results.to_dict(), "seconds": round(seconds, 1), "out": str(folder)})
    return OK


def measure_quality(
    loaded: Loaded,
    plan: MaskPlan,
    mode: str,
    *,
    sizes: DemoSizes,
    progress: Progress | None = None,
) -> list[QualityRow]:
    """Run the four tasks in one mode.

    Args:
        loaded: The model; it is as before afterwards.
        plan: Its plan.
        mode: ``"full"``, or one of `dynmask.accelerate`.
        sizes: How much to ask.
        progress: Called as ``progress(done, total, text)`` within each task.

    Returns:
        One row for each task.
    """
    model, tokenizer = loaded.model, loaded.tokenizer

    def lines() -> Result:
        return longeval(
            model,
            tokenizer,
            lines=sizes.lines,
            n=sizes.line_questions,
            questions=sizes.questions_per_record,
            seed=sizes.seed,
            progress=progress,
        )

    def inside() -> Result:
        return recall(
            model,
            tokenizer,
            load_texts("haystack"),
            lines=sizes.lines,
            n=sizes.recall_questions,
            questions=min(10, sizes.lines),
            seed=sizes.seed,
            progress=progress,
        )

    def needles() -> Result:
        return needle(
            model,
            tokenizer,
            load_texts("haystack"),
            length=sizes.needle_length,
            n=sizes.needle_questions,
            needles=sizes.needles,
            seed=sizes.seed,
            progress=progress,
        )

    def windows() -> Result:
        return perplexity(
            model,
            tokenizer,
            load_texts("perplexity"),
            length=sizes.perplexity_length,
            windows=sizes.windows,
            progress=progress,
        )

    rows = []
    for task in (lines, inside, needles, windows):
        with running(model, plan, mode) as active:
            result = task()
            rows.append(quality_row(result, mode, Cost.of(model, active)))
    return rows


def measure_speed(
    loaded: Loaded, plan: MaskPlan, *, sizes: DemoSizes, progress: Progress | None = None
) -> list[SpeedRow]:
    """Time the prefill of real text at each of the lengths, all modes in turn."""
    ids = encode_prefix(loaded.tokenizer, "\n\n".join(load_texts("perplexity")))
    rows: list[SpeedRow] = []
    assert len(ids) >= max(sizes.prefill_lengths), "the embedded text is too short to time"
    for length in sizes.prefill_lengths:
        rows += prefill_rows(
            loaded.model,
            plan,
            ids[:length],
            modes=MODES,
            repeats=sizes.repeats,
            progress=progress,
        )
    return rows
