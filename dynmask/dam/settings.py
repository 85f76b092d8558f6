"""The parameters of DAM's first stage, checked when they are set."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from dynmask.dam.amplify import AMPLIFIERS

#: A longer capture would need more than 16 GiB for one head's float32 map.
MAX_CAPTURE_LENGTH = 65536


@dataclass(frozen=True)
class Settings:
    """How a plan is made.

    Attributes:
        capture_length: L, tokens of each calibration text; maps are `[L, L]`.
        amplify: Name of the amplifier, a key of `AMPLIFIERS`.
        lam: Exponent of Box-Cox and Yeo-Johnson: 0 (logarithm) or 0.01 to 2.
        eps: Floor of a probability in Box-Cox and log, and the guard of divisions; 1e-30 to 0.01.
        tau: Threshold on the amplified map: a pair is in the true mask if its value is >= tau.
        mu: A column or an offset is matched if at least this share of its pairs is in the mask.
        support: A column or an offset counts only if at least this share of L rows shows it;
            `match` says why. 0 considers every one, as the paper does.
        coverage: Target share of attention; heads that keep less run dense in mode "auto".
        coverage_length: Most tokens of a held-out window, on which coverage is measured. It should
            be several times L: columns lie among the first L tokens, so within L stripes cover
            nearly everything, and only rows beyond show what they miss. Windows are shorter where
            the model's limit or the held-out texts are; a value below L counts as L.
        holdout: Share of the calibration tokens kept back to measure coverage.
        seed: Seed of the split into calibration and held-out texts.

    The defaults of tau, mu and coverage were chosen on the embedded model: with tau 0.01 and mu
    0.5 the heads that keep at least 0.98 of the attention on 4,096 tokens (12 of 36) run static
    without a loss on LongEval and on needles, and so do those of at least 0.97 (16). The ranges of
    the DAM paper, tau 0.1 to 0.3 and mu 0.8 to 0.9, keep 1 to 2 % of the pairs there, and retrieval
    is lost even if only the three best heads run static.

    Raises:
        ValueError: A value is out of its range; the message names it and the range.
    """

    capture_length: int = 1024
    amplify: str = "box-cox"
    lam: float = 0.5
    eps: float = 1e-10
    tau: float = 0.01
    mu: float = 0.5
    support: float = 0.25
    coverage: float = 0.98
    coverage_length: int = 4096
    holdout: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _checked_type(field.name, getattr(self, field.name), str(field.type))
            object.__setattr__(self, field.name, value)
        if self.amplify not in AMPLIFIERS:
            raise ValueError(f"amplify={self.amplify!r} is unknown; use one of {[*AMPLIFIERS]}")
        _check(
            2 <= self.capture_length <= MAX_CAPTURE_LENGTH,
            f"capture_length={self.capture_length} must be 2 to {MAX_CAPTURE_LENGTH} tokens",
        )
        _check(
            self.lam == 0 or 0.01 <= self.lam <= 2, f"lam={self.lam} must be 0, or from 0.01 to 2"
        )
        _check(1e-30 <= self.eps <= 0.01, f"eps={self.eps} must be from 1e-30 to 0.01")
        self._check_tau()
        _check(0 < self.mu <= 1, f"mu={self.mu} must be above 0 and at most 1")
        _check(0 <= self.support < 1, f"support={self.support} must be at least 0 and below 1")
        _check(0 < self.coverage <= 1, f"coverage={self.coverage} must be above 0 and at most 1")
        _check(
            self.coverage_length >= 2,
            f"coverage_length={self.coverage_length} must be at least 2 tokens",
        )
        _check(0 < self.holdout < 1, f"holdout={self.holdout} must be above 0 and below 1")
        _check(0 <= self.seed < 2**63, f"seed={self.seed} must be from 0 to 2^63 - 1")

    def _check_tau(self) -> None:
        low, high = AMPLIFIERS[self.amplify].bounds(self.lam, self.eps)
        if math.isinf(low):
            _check(math.isfinite(self.tau), f"tau={self.tau} must be finite")
            return
        limit = "finite" if math.isinf(high) else f"at most {high:.6g}"
        _check(
            low < self.tau <= high and math.isfinite(self.tau),
            f"tau={self.tau} must be above {low:g} and {limit}, the range of"
            f" amplify={self.amplify!r}; outside it the mask keeps everything or nothing",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dict of plain values, in the order of the fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Rebuild settings from `to_dict`'s result.

        Raises:
            ValueError: A key is missing or unknown, or a value is out of its range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise ValueError(
                f"settings: missing {sorted(names - set(values))}, unknown"
                f" {sorted(set(values) - names)}"
            )
        return cls(**values)


def _check(good: bool, message: str) -> None:
    if not good:
        raise ValueError(message)


def _checked_type(name: str, value: Any, kind: str) -> Any:
    # bool is an int in Python, and never a meaningful setting here.
    allowed = {"int": (int,), "float": (int, float), "str": (str,)}[kind]
    if isinstance(value, bool) or not isinstance(value, allowed):
        article = "an" if kind == "int" else "a"
        raise ValueError(f"{name}={value!r} must be {article} {kind}, not {type(value).__name__}")
    try:
        return float(value) if kind == "float" else value
    except OverflowError as error:
        raise ValueError(f"{name} is too large for a float") from error
