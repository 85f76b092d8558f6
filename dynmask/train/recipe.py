"""A training run written down: model, data, lengths, optimizer, schedule, seed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from dynmask.train.fields import changed, plain, read
from dynmask.train.loader import parse
from dynmask.train.mqar import Mqar
from dynmask.train.sections import (
    Cosine,
    HubText,
    Phase,
    Retrieval,
    Text,
    WarmupStableDecay,
)

MODELS = ("llama", "dma", "mistral", "deepseek_v3", "nsa", "moba")
"""Types of models; see `dynmask.train.models`."""

_MAX_BYTES = 2**18

FREE = (
    "micro_tokens",
    "compile",
    "gradient_checkpointing",
    "fsdp",
    "log_every",
    "save_every",
    "eval_every",
    "eval_sequences",
)
"""Fields that say how a run is computed and watched; a run may go on with other values."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run, apart from the text itself.

    Attributes:
        model: ``type``, one of `MODELS`, and fields of that type's configuration; see
            `dynmask.train.models.build_model` for these, ``size`` and ``from``.
        data: what to train on.
        phases: the curriculum of lengths.
        tokens_per_step: tokens of one optimizer step, over all devices.
        micro_tokens: tokens of one forward pass on one device; default its whole share. Smaller
            ones accumulate gradients: the same step, up to rounding, in less memory.
        tokenizer: a folder, a name on the hub or ``"embedded"``; default one trained on the text.
        vocab_size: entries of a tokenizer trained on the text.
        lr: peak learning rate of AdamW.
        schedule: of the learning rate.
        weight_decay: AdamW's.
        betas: AdamW's.
        clip: largest norm of the gradient.
        bf16: compute in bfloat16 with fp32 weights on a GPU; a CPU computes in fp32.
        compile: torch.compile the layers and the loss on a GPU; a CPU does not.
        gradient_checkpointing: compute each layer's activations again in the backward pass.
        fsdp: shard the model over the processes of torchrun (FSDP2, GPUs only) instead of
            replicating it (DDP); without effect in a single process.
        log_every: optimizer steps between entries of the log.
        save_every: optimizer steps between checkpoints.
        eval_every: optimizer steps between evaluations on held-out data; 0 for none.
        eval_sequences: sequences of the longest length in an evaluation.
        seed: decides the initial weights and every sequence.

    Raises:
        ValueError: a value is out of its range.
    """

    model: dict[str, Any]
    data: Retrieval | Text | HubText | Mqar
    phases: tuple[Phase, ...]
    tokens_per_step: int = 131_072
    micro_tokens: int | None = None
    tokenizer: str | None = None
    vocab_size: int = 4096
    lr: float = 1.5e-3
    schedule: Cosine | WarmupStableDecay = field(default_factory=Cosine)
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    bf16: bool = True
    compile: bool = True
    gradient_checkpointing: bool = False
    fsdp: bool = False
    log_every: int = 25
    save_every: int = 2000
    eval_every: int = 0
    eval_sequences: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model.get("type") not in MODELS:
            raise ValueError(
                f"model: type={self.model.get('type')!r} must be one of {', '.join(MODELS)}"
            )
        self._check_lengths()
        schedule = self.schedule
        decay = getattr(schedule, "decay_steps", 0)
        if schedule.warmup_steps > self.steps:
            raise ValueError(
                f"schedule: warmup_steps={schedule.warmup_steps} is more than the {self.steps} "
                f"steps of the run"
            )
        for name, value, good in (
            ("lr", self.lr, 0 < self.lr < math.inf),
            ("schedule: floor", schedule.floor, 0 <= schedule.floor <= 1),
            ("schedule: warmup_steps", schedule.warmup_steps, schedule.warmup_steps >= 0),
            ("schedule: decay_steps", decay, 0 <= decay <= self.steps - schedule.warmup_steps),
            ("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf),
            ("betas", self.betas, all(0 <= beta < 1 for beta in self.betas)),
            ("clip", self.clip, 0 < self.clip < math.inf),
            ("log_every", self.log_every, self.log_every >= 1),
            ("save_every", self.save_every, self.save_every >= 1),
            ("eval_every", self.eval_every, self.eval_every >= 0),
            ("eval_sequences", self.eval_sequences, self.eval_sequences >= 1),
            ("seed", self.seed, 0 <= self.seed < 2**32),  # numpy takes no more
        ):
            if not good:
                raise ValueError(f"{name}={value} is out of its range")

    def _check_lengths(self) -> None:
        if not self.phases:
            raise ValueError("phases: give at least one {length, steps}")
        micro = self.tokens_per_step if self.micro_tokens is None else self.micro_tokens
        if not 1 <= micro <= self.tokens_per_step or self.tokens_per_step % micro:
            raise ValueError(
                f"micro_tokens={micro} must be over 0 and divide tokens_per_step="
                f"{self.tokens_per_step}, over 0 too"
            )
        least = Mqar.shortest if isinstance(self.data, Mqar) else 64
        for phase in self.phases:
            if phase.length < least or phase.steps < 1 or micro % phase.length:
                raise ValueError(
                    f"phases: {phase} needs length >= {least}, steps >= 1 and a length that "
                    f"divides tokens_per_step={self.tokens_per_step}, and micro_tokens if given"
                )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(phase.steps for phase in self.phases)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(phase.length for phase in self.phases)

    def phase_at(self, step: int) -> tuple[int, int]:
        """The phase of optimizer step ``step`` (from 0), and its number in that phase (from 0).

        Raises:
            ValueError: the run has no such step.
        """
        left = step
        for number, phase in enumerate(self.phases):
            if 0 <= left < phase.steps:
                return number, left
            left -= phase.steps
        raise ValueError(f"step={step} is not in [0, {self.steps - 1}], the steps of the run")

    def length_at(self, step: int) -> int:
        """Sequence length of optimizer step ``step`` (from 0).

        Raises:
            ValueError: the run has no such step.
        """
        return self.phases[self.phase_at(step)[0]].length

    def parts(self, processes: int) -> int:
        """Micro batches of an optimizer step, over all processes.

        Raises:
            ValueError: they cannot be shared out evenly.
        """
        parts = self.tokens_per_step // self.micro_tokens if self.micro_tokens else processes
        if parts % processes or (self.tokens_per_step // parts) % self.longest:
            raise ValueError(
                f"micro_tokens={self.micro_tokens}: {self.tokens_per_step} tokens a step cannot be "
                f"shared out over {processes} processes in whole sequences of {self.longest}; "
                f"choose it so that tokens_per_step / micro_tokens is a multiple of {processes}"
            )
        return parts

    @classmethod
    def load(cls, path: Path | str, *, settings: list[str] | None = None) -> Recipe:
        """Read a recipe from YAML.

        Args:
            path: a file, or the name of a recipe of the package (``"embedded"``).
            settings: changes as ``key=value``; see `dynmask.train.fields.changed`.

        Raises:
            ValueError: no such file; a field that is unknown, missing, of another type or out of
                its range, by name.
        """
        try:
            raw = parse(_text(_find(path)))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(
                f"recipe: {path} cannot be read ({error}); give a YAML file or the name of a "
                f"recipe: {', '.join(named_recipes())}"
            ) from error
        settings = settings or []
        recipe: Recipe = read(cls, changed(raw, settings), "recipe")
        if recipe.tokenizer is not None and any(s.startswith("vocab_size=") for s in settings):
            raise ValueError(
                f"vocab_size is for a tokenizer that is trained on the text, and the recipe's is "
                f"{recipe.tokenizer}: set tokenizer=null, too"
            )
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as kept beside a checkpoint."""
        made: dict[str, Any] = plain(self)
        return made

    def identity(self) -> dict[str, Any]:
        """Plain values of what decides the run: neither `FREE` fields nor where the text lies."""
        made = {name: value for name, value in self.to_dict().items() if name not in FREE}
        made["data"] = {name: value for name, value in made["data"].items() if name != "path"}
        return made


def named_recipes() -> list[str]:
    """Names of the package's recipes."""
    folder = resources.files("dynmask.train").joinpath("recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir())


def _text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)  # not more: it may be a device
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it has over {_MAX_BYTES} bytes")
    return content.decode("utf-8")


def _find(path: Path | str) -> Path:
    if str(path) in named_recipes():
        return Path(str(resources.files("dynmask.train").joinpath("recipes", f"{path}.yaml")))
    return Path(path)
