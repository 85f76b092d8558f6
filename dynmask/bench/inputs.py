"""What is measured: settings, score kinds and tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

BENCHMARKS = ("op", "select", "decode", "backward", "table2")

_KNOT = 512
"""Tokens between the knots of the slow part of `local`."""


@dataclass(frozen=True)
class Settings:
    """What one benchmark runs.

    Args:
        benchmark: One of `BENCHMARKS`.
        device: ``"cuda"`` or ``"cpu"``.
        dtype: Of q, k and v.
        lengths: Key slots ``K``, cell by cell.
        scores: Names from `SCORES`.
        keep: ``w``, keys a row keeps.
        batch: ``B``; of the bounded cache only, in decode.
        heads: ``H``.
        groups: ``G``, kv heads.
        dim: ``D``.
        impl: Backend of `dynmask.ops.attention`.
        rounds: Timed calls of each run.
        warmups: Untimed calls before.
        budget: Seconds that the rounds of one run may cost.
        seed: Of the inputs.

    Raises:
        ValueError: If a number is out of its range or a name unknown.
    """

    benchmark: str
    device: str
    dtype: str
    lengths: tuple[int, ...]
    scores: tuple[str, ...]
    keep: int
    batch: int
    heads: int
    groups: int
    dim: int
    impl: str = "auto"
    rounds: int = 20
    warmups: int = 5
    budget: float = 6.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.benchmark not in BENCHMARKS:
            raise ValueError(f"no benchmark {self.benchmark}: use one of {list(BENCHMARKS)}")
        for name in ("keep", "batch", "heads", "groups", "dim", "rounds", "warmups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"lengths must be 2 or more tokens each, got {list(self.lengths)}")
        unknown = set(self.scores) - set(SCORES)
        if unknown or not self.scores:
            raise ValueError(f"scores {sorted(unknown)} unknown: use some of {list(SCORES)}")
        if self.heads % self.groups:
            raise ValueError(f"heads={self.heads} must be a multiple of groups={self.groups}")
        if self.budget <= 0:
            raise ValueError(f"budget={self.budget} must be more than 0 seconds")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return dataclasses.asdict(self)


_SCORES = 1 << 30
"""Keeps the seeds of scores apart from those of q, k and v."""
_K = 1024
_LENGTHS = {
    "op": (8 * _K, 32 * _K, 128 * _K, 512 * _K),
    "select": (8 * _K, 32 * _K, 128 * _K, 512 * _K, 1024 * _K),
    "decode": (8 * _K, 32 * _K, 128 * _K, 512 * _K, 1024 * _K),
    "backward": (8 * _K, 32 * _K, 128 * _K),
    "table2": tuple(256 << step for step in range(8)),
}


def settings_for(benchmark: str, *, device: str, quick: bool = False, **changed: Any) -> Settings:
    """Return the settings of a benchmark: the targets' on a GPU, tiny ones on a CPU.

    Args:
        benchmark: One of `BENCHMARKS`.
        device: ``"cuda"`` or ``"cpu"``; a CPU checks that the benchmark works and no more.
        quick: Fewer and shorter lengths and fewer rounds.
        changed: Fields of `Settings` that differ; None means the default.
    """
    lengths = _LENGTHS.get(benchmark, ())
    chosen: dict[str, Any] = {
        "benchmark": benchmark,
        "device": device,
        "dtype": "bfloat16",
        "lengths": lengths[:2] if quick else lengths,
        "scores": ("normal", "local"),
        "keep": 2048,
        "batch": 64 if benchmark == "decode" else 1,
        "heads": 32,
        "groups": 8,
        "dim": 128,
        "rounds": 5 if quick else 20,
    }
    if benchmark == "select":
        chosen["scores"] = ("normal", "local", "rising")
    if benchmark == "table2":
        chosen |= {"heads": 2, "groups": 1, "scores": ("dma",)}
    if device == "cpu":
        chosen |= {"dtype": "float32", "keep": 16, "dim": 32, "rounds": 3, "warmups": 2}
        chosen["lengths"] = (64, 100) if quick else (64, 200, 500)
        chosen |= {"batch": min(2, chosen["batch"]), "budget": 1.0}
        if benchmark != "table2":
            chosen |= {"heads": 4, "groups": 2}
    chosen |= {name: value for name, value in changed.items() if value is not None}
    return Settings(**chosen)


class Inputs(NamedTuple):
    """The tensors of one cell.

    Attributes:
        q: ``[B, H, Q, D]``.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor


def make_inputs(settings: Settings, length: int, *, q_len: int | None = None) -> Inputs:
    """Return q, k and v of standard normal entries; the same for the same settings."""
    random = generator(settings, length)
    batch, dim = settings.batch, settings.dim

    def normal(heads: int, count: int) -> Tensor:
        shape = (batch, heads, count, dim)
        dtype = getattr(torch, settings.dtype)
        return torch.randn(shape, generator=random, dtype=dtype, device=settings.device)

    q = normal(settings.heads, length if q_len is None else q_len)
    return Inputs(q, normal(settings.groups, length), normal(settings.groups, length))


def make_score(settings: Settings, kind: str, length: int) -> Tensor:
    """Return ``[B, G, length]`` float32 scores of a kind of `SCORES`."""
    shape = (settings.batch, settings.groups, length)
    return SCORES[kind](shape, generator(settings, length + _SCORES))


def generator(settings: Settings, length: int) -> torch.Generator:
    """Return a generator that depends on the seed and the length alone."""
    return torch.Generator(settings.device).manual_seed(settings.seed + length)


def _normal(shape: tuple[int, int, int], random: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=random, device=random.device)


def _local(shape: tuple[int, int, int], random: torch.Generator) -> Tensor:
    batch, groups, length = shape
    knots = torch.randn(
        batch, groups, -(-length // _KNOT) + 1, generator=random, device=random.device
    )
    slow = torch.nn.functional.interpolate(
        knots, size=(knots.shape[-1] - 1) * _KNOT + 1, mode="linear", align_corners=True
    )
    return 0.6 * _normal(shape, random) + 0.8 * slow[..., :length]


def _recent(shape: tuple[int, int, int], random: torch.Generator) -> Tensor:
    return _normal(shape, random) + _rising(shape, random)


def _rising(shape: tuple[int, int, int], random: torch.Generator) -> Tensor:
    ramp = torch.arange(shape[-1], device=random.device) * (4 / shape[-1])
    return ramp.expand(shape).contiguous()


def _dma(shape: tuple[int, int, int], random: torch.Generator) -> Tensor:
    return (-0.5 * torch.nn.functional.softplus(_normal(shape, random))).exp()


SCORES: dict[str, Callable[[tuple[int, int, int], torch.Generator], Tensor]] = {
    "normal": _normal,
    "local": _local,
    "recent": _recent,
    "rising": _rising,
    "dma": _dma,
}
"""Kinds of scores, ``z`` standard normal and independent, ``j`` the key slot of ``K``.

- ``normal``: ``z``.
- ``local``: ``0.6 z + 0.8 u``, where ``u`` is standard normal at every 512th slot and linear
  between, so that kept keys come in clusters.
- ``recent``: ``z + 4 j / K``, keys fade as newer ones come.
- ``rising``: ``4 j / K``: every new key evicts the oldest, so the mask is a sliding window.
- ``dma``: ``exp(-0.5 softplus(z))``, what an initialised DMA layer computes: positive.
"""
