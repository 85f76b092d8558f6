"""A training run written down: model shape, data mixture, lengths, optimizer, seed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from dynmask.train.mixture import Mixture


@dataclass(frozen=True)
class Phase:
    """So many optimizer steps at one sequence length (tokens)."""

    length: int
    steps: int


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run, apart from the text itself.

    Attributes:
        model: fields of ``transformers.LlamaConfig``.
        phases: the curriculum of lengths.
        tokens_per_step: tokens of one optimizer step, on all devices together.
        lr: peak learning rate of AdamW; warm-up is linear, decay is a cosine to ``lr * floor``.
        seed: decides the initial weights and every sequence.
        mixture: shares of the sequence kinds and loss weights.
        vocab_size: entries of the tokenizer, trained on the same text.
    """

    model: dict[str, Any]
    phases: tuple[Phase, ...]
    tokens_per_step: int = 131_072
    lr: float = 1.5e-3
    floor: float = 0.05
    warmup_steps: int = 200
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0
    vocab_size: int = 4096
    mixture: Mixture = field(default_factory=Mixture)

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("phases: give at least one {length, steps}")
        for phase in self.phases:
            if phase.length < 64 or phase.steps < 1 or self.tokens_per_step % phase.length:
                raise ValueError(
                    f"phases: {phase} needs length >= 64, steps >= 1 and a length that divides "
                    f"tokens_per_step={self.tokens_per_step}"
                )
        if self.lr <= 0 or not 0 <= self.floor <= 1:
            raise ValueError(f"lr must be > 0 and floor in [0, 1], got {self.lr} and {self.floor}")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(phase.steps for phase in self.phases)

    def length_at(self, step: int) -> int:
        """Sequence length of optimizer step ``step`` (from 0)."""
        for phase in self.phases:
            if step < phase.steps:
                return phase.length
            step -= phase.steps
        raise ValueError(f"step is past the last of {self.steps} steps")

    @classmethod
    def load(cls, path: Path | str) -> Recipe:
        """Read a recipe from YAML.

        Raises:
            ValueError: an unknown or missing field, by name.
        """
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"recipe: {path} is not a mapping of fields")
        _check_fields(cls, raw, "recipe")
        _check_fields(Mixture, raw.get("mixture", {}), "recipe: mixture")
        mixture = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.pop("mixture", {}).items()}
        for phase in raw.get("phases", []):
            _check_fields(Phase, phase, "recipe: phases")
        raw["phases"] = tuple(Phase(**phase) for phase in raw.get("phases", []))
        if "betas" in raw:
            raw["betas"] = tuple(raw["betas"])
        if "model" not in raw:
            raise ValueError("recipe: the field 'model' is missing")
        return cls(**raw, mixture=Mixture(**mixture))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as kept beside a checkpoint."""
        return asdict(self)


def _check_fields(kind: type, raw: dict[str, Any], where: str) -> None:
    unknown = sorted(set(raw) - {f.name for f in fields(kind)})
    if unknown:
        known = ", ".join(f.name for f in fields(kind))
        raise ValueError(f"{where}: unknown field {', '.join(unknown)}; known are {known}")
