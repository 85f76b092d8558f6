"""A training run written down: model shape, data mixture, lengths, optimizer, seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib import resources
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
        model: fields of ``transformers.LlamaConfig``; ``max_position_embeddings`` must be there.
        phases: the curriculum of lengths.
        tokens_per_step: tokens of one optimizer step.
        lr: peak learning rate of AdamW; warm-up is linear, decay is a cosine to ``lr * floor``.
        floor: last learning rate over the peak.
        warmup_steps: optimizer steps of the warm-up.
        weight_decay: AdamW's.
        betas: AdamW's.
        clip: largest norm of the gradient.
        seed: decides the initial weights and every sequence.
        vocab_size: entries of the tokenizer, trained on the same text.
        mixture: shares of the sequence kinds and loss weights.

    Raises:
        ValueError: a value is out of its range.
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
            if (
                phase.length < 64
                or phase.steps < 1
                or self.tokens_per_step < 1
                or self.tokens_per_step % phase.length
            ):
                raise ValueError(
                    f"phases: {phase} needs length >= 64, steps >= 1 and a length that divides "
                    f"tokens_per_step={self.tokens_per_step}"
                )
        if self.longest > self.context:
            raise ValueError(
                f"model: max_position_embeddings={self.context} must be given and at least "
                f"{self.longest}, the longest phase"
            )
        for name, good in (
            ("lr", self.lr > 0),
            ("floor", 0 <= self.floor <= 1),
            ("warmup_steps", self.warmup_steps >= 0),
            ("weight_decay", self.weight_decay >= 0),
            ("betas", all(0 <= beta < 1 for beta in self.betas)),
            ("clip", self.clip > 0),
            ("seed", self.seed >= 0),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)} is out of its range")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(phase.steps for phase in self.phases)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(phase.length for phase in self.phases)

    @property
    def context(self) -> int:
        """The model's context in tokens; 0 if the recipe names none."""
        return int(self.model.get("max_position_embeddings", 0))

    def length_at(self, step: int) -> int:
        """Sequence length of optimizer step ``step`` (from 0).

        Raises:
            ValueError: the run has no such step.
        """
        left = step
        for phase in self.phases:
            if 0 <= left < phase.steps:
                return phase.length
            left -= phase.steps
        raise ValueError(f"step={step} is not in [0, {self.steps - 1}], the steps of the run")

    @classmethod
    def load(cls, path: Path | str) -> Recipe:
        """Read a recipe from YAML.

        Args:
            path: a file, or the name of a recipe of the package (``"embedded"``).

        Raises:
            ValueError: no such file; a field that is unknown, missing, of another type or out of
                its range, by name.
        """
        try:
            raw = yaml.safe_load(_find(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(
                f"recipe: {path} cannot be read ({error}); give a YAML file or the name of a "
                f"recipe: {', '.join(named_recipes())}"
            ) from error
        raw = _checked(cls, raw, "recipe")
        raw["phases"] = tuple(
            Phase(**_checked(Phase, phase, "recipe: phases")) for phase in raw["phases"]
        )
        raw["mixture"] = Mixture(**_checked(Mixture, raw.get("mixture", {}), "recipe: mixture"))
        return cls(**raw)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as kept beside a checkpoint."""
        return asdict(self)


def named_recipes() -> list[str]:
    """Names of the package's recipes."""
    folder = resources.files("dynmask.train").joinpath("recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir())


def _find(path: Path | str) -> Path:
    if str(path) in named_recipes():
        return Path(str(resources.files("dynmask.train").joinpath("recipes", f"{path}.yaml")))
    return Path(path)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return _integer(value) or isinstance(value, float)


def _pair(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(of, value))


_FITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (_integer, "an integer"),
    "float": (_number, "a number (YAML wants a point in 2.0e-3)"),
    "tuple[int, int]": (lambda value: _pair(value, _integer), "a list of two integers"),
    "tuple[float, float]": (lambda value: _pair(value, _number), "a list of two numbers"),
    "tuple[Phase, ...]": (lambda value: isinstance(value, list), "a list of {length, steps}"),
    "dict[str, Any]": (lambda value: isinstance(value, dict), "a mapping of fields"),
    "Mixture": (lambda value: isinstance(value, dict), "a mapping of fields"),
}
"""For each annotation of a field: what YAML may hold there, and its name."""


def _checked(kind: type, raw: Any, where: str) -> dict[str, Any]:
    """A copy of ``raw``, whose fields are those of the dataclass ``kind``; pairs become tuples."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: {raw!r} is not a mapping of fields")
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(str(name) for name in raw if name not in known):
        raise ValueError(
            f"{where}: unknown field {', '.join(unknown)}; known are {', '.join(known)}"
        )
    for name, f in known.items():
        if name not in raw and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{where}: the field {name!r} is missing")
    for name, value in raw.items():
        fits, wanted = _FITS[str(known[name].type)]
        if not fits(value):
            raise ValueError(f"{where}: {name}={value!r} must be {wanted}")
    return {name: tuple(v) if isinstance(v, list) else v for name, v in raw.items()}
