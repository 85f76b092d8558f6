"""What watches a run: whole checkpoints, the time limit, throughput and progress."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback

from dynmask.train.trainer import NonFiniteLossError

Report = Callable[[int, int, str], None]
"""Gets the steps done, all steps, and a note."""

_MARK = "whole.json"


class WholeCheckpoints(TrainerCallback):
    """Marks a checkpoint as whole once every process has written its part of it.

    The mark names the files and their sizes. What has no mark, or other files, was interrupted and
    is never resumed from.
    """

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the weights, then mark.

        Raises:
            NonFiniteLossError: a weight is no number; the checkpoint stays unmarked.
        """
        if not _finite(kwargs["model"]):
            raise NonFiniteLossError(
                f"weights are not finite after step {state.global_step}; the last checkpoint is "
                f"from before: lower lr or raise warmup_steps, in another folder"
            )
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write(folder / _MARK, json.dumps(_sizes(folder)))
        PartialState().wait_for_everyone()


def last_checkpoint(out: Path) -> Path | None:
    """The last checkpoint that is whole."""
    whole = [path for path in out.glob("checkpoint-*") if _is_whole(path)]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def remove_broken(out: Path) -> None:
    """Remove checkpoints that were interrupted: the Trainer would count them among the last."""
    for path in out.glob("checkpoint-*"):
        if not _is_whole(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    mark = folder / _MARK
    return mark.exists() and json.loads(mark.read_text(encoding="utf-8")) == _sizes(folder)


def _sizes(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != _MARK]
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(files)}


def _finite(model: torch.nn.Module) -> bool:
    flags = []
    for parameter in model.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        flags.append(local.detach().isfinite().all())
    return bool(torch.stack(flags).all())


class TimeLimit(TrainerCallback):
    """Saves and stops after so many minutes; the run resumes from there.

    Several processes stop at the same step: every tenth, the first one says whether.
    """

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for a checkpoint and a stop once the time is up."""
        over = time.monotonic() > self.end
        if args.world_size > 1:
            if state.global_step % 10:
                return control
            flag = torch.tensor(float(over), device=args.device)
            torch.distributed.broadcast(flag, src=0)
            over = bool(flag)
        if over:
            control.should_save = control.should_training_stop = True
        return control


class Throughput(TrainerCallback):
    """Tokens per second and MFU, in the log and in the progress.

    Time spent on evaluation and checkpoints does not count, nor does the first step of a run.

    Args:
        tokens_per_step: over all processes.
        flops_per_token: by step, from 0; see `dynmask.train.flops`.
        peak: operations per second of all devices together.
        progress: gets steps done, all steps and a note, in the first process.
    """

    def __init__(
        self,
        tokens_per_step: int,
        flops_per_token: Callable[[int], float | None],
        peak: float,
        progress: Report | None = None,
    ) -> None:
        self.tokens_per_step, self.peak = tokens_per_step, peak
        self.flops_per_token, self.progress = flops_per_token, progress
        self.last: dict[str, float] = {}
        self._loss: float | None = None
        self._since: float | None = None
        self._steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step."""
        if self._since is None:
            self._restart()
        else:
            self._steps += 1
        if self.progress is not None and state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps, self._note())

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the figures to the entry that was just made."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        self._loss = logs["loss"]
        if self._steps and self._since is not None:
            speed = self._steps * self.tokens_per_step / (time.perf_counter() - self._since)
            self.last = {"tokens_per_second": round(speed, 1)}
            flops = self.flops_per_token(state.global_step - 1)
            if flops is not None:
                self.last["mfu"] = round(speed * flops / self.peak, 5)
            logs.update(self.last)
            state.log_history[-1].update(self.last)
        self._restart()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the evaluation's time out."""
        self._restart()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the checkpoint's time out."""
        self._restart()

    def _restart(self) -> None:
        self._since, self._steps = time.perf_counter(), 0

    def _note(self) -> str:
        words = [] if self._loss is None else [f"loss {self._loss:.4g}"]
        if self.last:
            words.append(f"{self.last['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in self.last:
            words.append(f"MFU {100 * self.last['mfu']:.1f} %")
        return ", ".join(words)


def write(path: Path, text: str) -> None:
    """Write under another name, then rename: ``path`` is whole or not there."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
