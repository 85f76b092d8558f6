"""Train a causal language model from a recipe with the transformers Trainer."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)

from dynmask.train.arguments import training_arguments
from dynmask.train.batches import HeldOut, Steps, only_item
from dynmask.train.callbacks import (
    Report,
    Throughput,
    TimeLimit,
    WholeCheckpoints,
    last_checkpoint,
    remove_broken,
    write,
)
from dynmask.train.fields import differences
from dynmask.train.flops import flops_per_token, measured_peak
from dynmask.train.models import build_model, check_model
from dynmask.train.prepare import Prepared, check_data, prepare
from dynmask.train.recipe import Recipe
from dynmask.train.source import Source
from dynmask.train.trainer import WeightedTrainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        complete: whether all steps are done; else it was stopped by the time limit.
        steps: optimizer steps done, those before a resumption included.
        log: the entries of the Trainer's log.
        peak: floating-point operations per second that MFU is a share of, of all devices.
        devices: what it ran on.
    """

    complete: bool
    steps: int
    log: list[dict[str, Any]]
    peak: float
    devices: str

    def last(self, name: str) -> Any:
        """The last value of a name in the log; None if there is none."""
        return next((entry[name] for entry in reversed(self.log) if name in entry), None)


def claim(out: Path, recipe: Recipe, source: Source | None = None) -> None:
    """Note in ``out`` which run the folder is for: recipe and data.

    Args:
        out: the run's folder.
        recipe: the run.
        source: its data; without it the recipe alone is compared, and nothing is noted.

    Raises:
        ValueError: ``out`` holds a run of another recipe or on other data; names what differs.
    """
    note = out / "run.json"
    # Through JSON, so that what is compared is what comes back.
    identity = json.loads(json.dumps(recipe.identity()))
    found = json.loads(note.read_text(encoding="utf-8")) if note.exists() else None
    if found and (changes := differences(found["recipe"], identity)):
        raise ValueError(
            f"out: {out} holds a run of another recipe ({'; '.join(changes)}); give another "
            f"folder, or the recipe that it was started with"
        )
    if source is None:
        return
    run = {"recipe": identity, "text_sha256": source.sha256()}
    if found and found != run:
        raise ValueError(f"out: {out} holds a run on other text; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    write(note, json.dumps(run, indent=1))


def train(
    recipe: Recipe,
    out: Path | str,
    *,
    data: str | None = None,
    minutes: float | None = None,
    workers: int = 2,
    progress: Report | None = None,
) -> Result:
    """Train, or go on from the last checkpoint in ``out``.

    On the CPU, on one GPU, or, started by ``torchrun``, on a GPU (or share of the CPU) a process.
    Several visible GPUs without ``torchrun``: the first one is used.

    Writes into ``out``: ``tokenizer`` and ``corpus`` (made once), ``run.json`` (recipe and digest
    of the data), ``checkpoint-*`` while it runs (the last two), and when it is complete
    ``log.json`` and ``model/`` (bf16 safetensors with the tokenizer). A checkpoint whose writing
    was interrupted is not resumed from. A resumed run takes the steps that it would have taken.

    Args:
        recipe: what to run.
        out: a folder; a run found there goes on if its recipe and data are the same.
        data: where the data is, in place of the recipe's ``data.path``.
        minutes: stop after that long with a checkpoint.
        workers: processes that make batches; 0 makes them in this one.
        progress: gets steps done, all steps and a note after every step.

    Raises:
        ValueError: ``out`` is a file or holds another run, ``minutes`` is not over 0, there is no
            such data or model or they do not fit, or the recipe cannot be run on these devices.
        NonFiniteLossError: the loss or the weights are no numbers; the batch is saved in ``out``.
    """
    out = Path(out)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    parts = recipe.parts(processes)
    on_gpu = torch.cuda.is_available()
    fsdp = recipe.fsdp and processes > 1
    if fsdp and not on_gpu:
        raise ValueError("fsdp: sharding needs GPUs; set fsdp: false to replicate on the CPU")
    if minutes is not None and not 0 < minutes < math.inf:
        raise ValueError(f"minutes={minutes} must be over 0 and finite; leave it out for no limit")
    for place in (out, *out.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"out: {place} is a file; give a folder")
    # Before anything is written, so that the folder stays free for the recipe that is meant.
    check_data(recipe, path=data)
    check_model(recipe)
    arguments = training_arguments(
        recipe, out, workers=workers, accumulate=parts // processes, fsdp=fsdp
    )
    # Without torchrun the Trainer would copy the model to all GPUs in every step.
    arguments.n_gpu  # noqa: B018  (sets up the devices)
    arguments._n_gpu = min(arguments._n_gpu, 1)
    with arguments.main_process_first(local=False):
        claim(out, recipe)
        prepared = prepare(recipe, out, path=data)
        special = _special_tokens(prepared.tokenizer)
        check_model(recipe, vocab_size=prepared.vocab_size, **special)
        claim(out, recipe, prepared.train)
        if arguments.process_index == 0:
            remove_broken(out)
    model = build_model(recipe, vocab_size=prepared.vocab_size, **special)
    kind = type(model)  # FSDP2 gives the model another one
    compiled = recipe.compile and on_gpu
    if compiled:
        for layer in model.get_decoder().layers:
            layer.compile()
    if recipe.gradient_checkpointing:
        # Earlier versions of transformers know it by its second name only.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    peak = measured_peak(arguments.device) * processes
    flops = {length: flops_per_token(model, length) for length in _lengths(recipe)}

    def flops_at(step: int) -> float | None:
        """Not known where the output projection is applied to some positions, as many as come."""
        return None if trainer.head.partial else flops[recipe.length_at(step)]

    speed = Throughput(recipe.tokens_per_step, flops_at, peak, progress)
    trainer = WeightedTrainer(
        model=model,
        args=arguments,
        train_dataset=Steps(prepared.train, recipe, parts=parts),
        eval_dataset=HeldOut(prepared.valid, recipe) if prepared.valid else None,
        data_collator=only_item,
        callbacks=[
            speed,
            WholeCheckpoints(),
            *([TimeLimit(minutes)] if minutes is not None else []),
        ],
        recipe=recipe,
        source=prepared.train,
        compiled=compiled,
    )
    trainer.remove_callback(PrinterCallback)
    found = last_checkpoint(out)
    if found is not None:
        _check_sharding(found, fsdp)
    arguments.eval_on_start = bool(recipe.eval_every) and found is None
    log.info("%s", f"resuming from {found}" if found else "starting")
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    complete = trainer.state.global_step >= recipe.steps
    if complete:
        _finish(trainer, kind, out, prepared)
    devices = torch.cuda.get_device_name() if on_gpu else "CPU"
    return Result(
        complete,
        trainer.state.global_step,
        trainer.state.log_history,
        peak,
        f"{processes} {devices}",
    )


def _check_sharding(checkpoint: Path, fsdp: bool) -> None:
    """Refuse a checkpoint of a sharded run to one that is not, and the other way round."""
    sharded = any(checkpoint.glob("pytorch_model_fsdp*"))
    if sharded != fsdp:
        wrote, reads = ("shards", "does not") if sharded else ("does not shard", "does")
        raise ValueError(
            f"fsdp: {checkpoint} is of a run that {wrote}, and this one {reads}; set fsdp: "
            f"{str(sharded).lower()}{' and start several processes' if sharded else ''}"
        )


def _lengths(recipe: Recipe) -> set[int]:
    return {phase.length for phase in recipe.phases}


def _special_tokens(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, int | None]:
    if tokenizer is None:
        return {}
    return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def _finish(
    trainer: WeightedTrainer, kind: type[PreTrainedModel], out: Path, prepared: Prepared
) -> None:
    """Write the log and the model; all processes take part, the first one writes."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    write(out / "log.json", json.dumps(trainer.state.log_history))
    config = trainer.accelerator.unwrap_model(trainer.model_wrapped).config
    # Sharded parameters cannot be saved as they are: a plain model takes the gathered ones.
    with torch.device("meta"):
        plain = kind(config)
    gathered = {name: tensor.bfloat16() for name, tensor in weights.items()}
    plain.load_state_dict(gathered, strict=False, assign=True)
    plain.tie_weights()
    assert not any(parameter.is_meta for parameter in plain.parameters())
    plain.config.use_cache = True  # which the Trainer turned off
    _save(plain, prepared.tokenizer, out / "model")


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Save to a folder of another name, then rename: ``folder`` is whole or not there."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
