"""The parts of a recipe: phases, schedules of the learning rate, kinds of text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dynmask.train.mixture import Mixture


@dataclass(frozen=True)
class Phase:
    """So many optimizer steps at one sequence length (tokens)."""

    length: int
    steps: int


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then a cosine down to ``floor`` of the peak at the last step."""

    type: ClassVar[str] = "cosine"

    warmup_steps: int = 200
    floor: float = 0.05


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warm-up, the peak, and in the last steps a fall of the form ``1 - sqrt(x)``.

    Attributes:
        warmup_steps: steps of the warm-up.
        decay_steps: steps of the fall.
        floor: last learning rate over the peak.
    """

    type: ClassVar[str] = "wsd"

    warmup_steps: int = 200
    decay_steps: int = 1000
    floor: float = 0.0


@dataclass(frozen=True)
class Retrieval:
    """Text, needles, records and key-value lists; see `Mixture`.

    Attributes:
        path: a folder of text (see `dynmask.train.texts.Folder`), or ``"embedded"`` for the texts
            of the package; ``--data`` gives it too.
        train: glob on the names of the training files.
        valid: the same of the held-out files.
        mixture: shares and weights.
    """

    type: ClassVar[str] = "retrieval"

    path: str | None = None
    train: str = "train*"
    valid: str = "valid*"
    mixture: Mixture = field(default_factory=Mixture)


@dataclass(frozen=True)
class Text:
    """Running text from a folder; the fields are those of `Retrieval`, and these.

    Attributes:
        path: see `Retrieval`.
        train: see `Retrieval`.
        valid: see `Retrieval`.
        column: field of a ``.jsonl`` row that holds the text.
        packed: the documents of a sequence do not see each other.
    """

    type: ClassVar[str] = "text"

    path: str | None = None
    train: str = "train*"
    valid: str = "valid*"
    column: str = "text"
    packed: bool = True


@dataclass(frozen=True)
class HubText:
    """Running text from a Hugging Face dataset.

    Attributes:
        path: name or folder of the dataset; ``--data`` gives it too.
        config: its configuration, where it has several.
        train: split to train on.
        valid: split to hold out.
        column: column that holds the text.
        packed: the documents of a sequence do not see each other.
    """

    type: ClassVar[str] = "dataset"

    path: str | None = None
    config: str | None = None
    train: str = "train"
    valid: str = "validation"
    column: str = "text"
    packed: bool = True
