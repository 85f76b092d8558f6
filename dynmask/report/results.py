"""The results file: what was measured, on which machine, with which versions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from dynmask.dam.codec import depth

_Row = TypeVar("_Row", "QualityRow", "SpeedRow")

FORMAT = "dynmask-results"
VERSION = 1
_MAX_DEPTH = 16

#: Modes in the order in which tables show them, with the words that readers see.
MODES = {
    "full": "full attention",
    "static": "DAM static",
    "dynamic": "DAM dynamic",
    "auto": "DAM auto",
    "dense": "all dense",
}


@dataclass(frozen=True)
class QualityRow:
    """One task in one mode.

    Attributes:
        task: Name of the task, as in ``Result.task``.
        mode: ``"full"`` (the model's own attention), one of `dynmask.accelerate`, or the name of a
            method of `dynmask.baselines`.
        metric: ``"accuracy"`` (0 to 1, more is better) or ``"perplexity"`` (less is better).
        score: The measured value.
        interval: 95 % interval of the score, or None where the task gives none.
        n: Number of questions or windows.
        density: Share of the causal pairs that the masks show, measured over the prefills.
        computed: Share of the causal pairs that was evaluated; 1 for a dense kernel.
        seconds: Wall-clock time of the task.
        impl: What ran the prefills' attention, with the number of calls.
        settings: What the task was run with.
        decode: Share of the causal pairs that decode steps looked at, where they chose their keys.
        metrics: Further figures by name, as `dynmask eval` prints them: losses by position of
            perplexity, shares of questions answered in full.
    """

    task: str
    mode: str
    metric: str
    score: float
    interval: tuple[float, float] | None
    n: int
    density: float
    computed: float
    seconds: float
    impl: str
    settings: dict[str, Any] = field(default_factory=dict)
    decode: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SpeedRow:
    """Prefill time of one mode at one length.

    Attributes:
        mode: As in `QualityRow`.
        length: Tokens in the prompt.
        seconds: Median of the repeats.
        spread: Fastest and slowest repeat, in seconds.
        ratio: Median over the repeats of baseline seconds / own seconds; above 1 is faster.
        ratio_spread: Smallest and largest of these ratios.
        density: As in `QualityRow`.
        computed: As in `QualityRow`.
        impl: As in `QualityRow`, for one prefill.
        repeats: Number of timed repeats; the modes alternate within each.
        baseline: Name of the attention that the ratio compares with.
    """

    mode: str
    length: int
    seconds: float
    spread: tuple[float, float]
    ratio: float
    ratio_spread: tuple[float, float]
    density: float
    computed: float
    impl: str
    repeats: int
    baseline: str


@dataclass(frozen=True)
class Results:
    """Everything that one run measured.

    Attributes:
        model: Name of the model.
        date: Time of the run, ISO 8601 in UTC.
        machine: `dynmask.report.machine.machine` at that time.
        versions: `dynmask.report.machine.versions` at that time.
        quality: Rows of the quality table.
        speed: Rows of the speed table.
    """

    model: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    quality: tuple[QualityRow, ...] = ()
    speed: tuple[SpeedRow, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return what `save` writes and `from_dict` reads."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Any, *, source: str = "results") -> Results:
        """Read what `to_dict` made.

        Args:
            data: The parsed JSON.
            source: Name of the file, for the message.

        Raises:
            ValueError: `data` is not a results document of this version.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(
                f"{source} is not a dynmask results file; write one with "
                "'dynmask eval ... --out FILE.json' or 'dynmask demo'"
            )
        if data.get("version") != VERSION:
            raise ValueError(
                f"{source} has results version {data.get('version')!r}, this dynmask reads "
                f"version {VERSION}; measure again"
            )
        try:
            if depth(data) > _MAX_DEPTH:
                raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
            if not isinstance(data["machine"].get("gpus", []), list):
                raise ValueError("the machine's gpus are no list")
            return cls(
                model=str(data["model"]),
                date=str(data["date"]),
                machine=dict(data["machine"]),
                versions=dict(data["versions"]),
                quality=tuple(_row(QualityRow, row) for row in data["quality"]),
                speed=tuple(_row(SpeedRow, row) for row in data["speed"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{source} is damaged ({error}); measure again") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the results as JSON: to a temporary file beside `path`, then renamed."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """Read a file that `save` wrote.

        Raises:
            ValueError: The file is missing or is not a results file.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"cannot read the results file {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error})") from error
        return cls.from_dict(data, source=str(path))


def merge(documents: list[Results]) -> Results:
    """Join the rows of several runs; model, date, machine and versions are the first run's.

    Raises:
        ValueError: The list is empty, or the runs measured different models.
    """
    if not documents:
        raise ValueError("merge needs at least one results document")
    first = documents[0]
    for other in documents[1:]:
        if other.model != first.model:
            raise ValueError(
                f"the results are of two models, {first.model!r} and {other.model!r}; "
                "make one report for each"
            )
    return Results(
        model=first.model,
        date=first.date,
        machine=first.machine,
        versions=first.versions,
        quality=tuple(row for document in documents for row in document.quality),
        speed=tuple(row for document in documents for row in document.speed),
    )


def _row(kind: type[_Row], raw: dict[str, Any]) -> _Row:
    """Make a row of what JSON holds, if every value has its type: pages trust them."""
    row = kind(**_pairs(raw))
    for each in fields(row):
        value = getattr(row, each.name)
        if not _FITS[str(each.type)](value):
            raise ValueError(f"{each.name}={value!r:.80} must be {each.type}")
    return row


def _is_number(value: object) -> bool:
    # A whole number that is too large for a float would end in an OverflowError.
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and not (isinstance(value, int) and abs(value) > 2**63)
    )


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value))


_FITS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: _is_number(value) and isinstance(value, int),
    "float": _is_number,
    "float | None": lambda value: value is None or _is_number(value),
    "tuple[float, float]": _is_pair,
    "tuple[float, float] | None": lambda value: value is None or _is_pair(value),
    "dict[str, Any]": lambda value: isinstance(value, dict),
    "dict[str, float]": lambda value: (
        isinstance(value, dict) and all(map(_is_number, value.values()))
    ),
}


def _pairs(row: dict[str, Any]) -> dict[str, Any]:
    """Turn the two-element lists that JSON gives back into tuples."""
    names = ("interval", "spread", "ratio_spread")
    return {k: tuple(v) if k in names and v is not None else v for k, v in row.items()}
