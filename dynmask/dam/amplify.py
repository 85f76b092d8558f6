"""Amplify mean attention maps, so that one threshold serves every head.

Attention probabilities fall over many orders of magnitude: a threshold on the raw mean keeps the
sinks and loses the rest. Each amplifier is a monotone map of the mean probability of a pair; the
nine are those that DAM compares (arXiv 2506.11104). Box-Cox is the default there and here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dynmask.dam.settings import Settings

#: Rounding of half-precision probabilities may carry a mean this far past 1.
_ABOVE_ONE = 1e-2


@dataclass(frozen=True)
class Amplifier:
    """One amplification.

    Attributes:
        apply: `(mean [H, L, L], total [H, L, L], lam, eps) -> [H, L, L]`, float32. What it writes
            above the diagonal is discarded.
        bounds: `(lam, eps) -> (low, high)`, the range of its values. A low of 0 is the value of a
            hidden pair, so a threshold must lie above it.
    """

    apply: Callable[[Tensor, Tensor, float, float], Tensor]
    bounds: Callable[[float, float], tuple[float, float]]


def _unit(lam: float, eps: float) -> tuple[float, float]:
    return 0.0, 1.0


def _power(mean: Tensor, lam: float, eps: float) -> Tensor:
    """`(max(x, eps)^lam - eps^lam) / lam`: Box-Cox less its value at eps, in one subtraction."""
    floored = mean.clamp_min(eps)
    if lam == 0:
        power = floored.log_().sub_(math.log(eps))
    else:
        power = floored.pow_(lam).sub_(eps**lam).div_(lam)
    # float32's power of eps may round below the scalar's.
    return power.clamp_min_(0)


def box_cox(mean: Tensor, total: Tensor, lam: float, eps: float) -> Tensor:
    """Box-Cox: `B = (max(x, eps)^lam - 1) / lam` (`log max(x, eps)` at lam 0), less `min B`.

    A causal map holds zeros above its diagonal, so its minimum is `B(eps)` whatever the head; a
    threshold tau therefore means the same probability in every map: at lam 0.5,
    `x >= (tau / 2 + sqrt(eps))^2`, and the largest value is 2.

    Source: Box and Cox, "An Analysis of Transformations", 1964; DAM, arXiv 2506.11104.
    """
    return _power(mean, lam, eps)


def _box_cox_bounds(lam: float, eps: float) -> tuple[float, float]:
    return 0.0, -math.log(eps) if lam == 0 else (1 - eps**lam) / lam


def average(mean: Tensor, total: Tensor, lam: float, eps: float) -> Tensor:
    """The mean probability itself: `x`."""
    return mean


def raw_sum(mean: Tensor, total: Tensor, lam: float, eps: float) -> Tensor:
    """The sum of the probabilities over the texts; grows with the number of texts."""
    return total


def logarithm(mean: Tensor, total: Tensor, lam: float, eps: float) -> Tensor:
    """`log max(x, eps) - log eps`: in `[0, -log eps]`, nats above the floor. Ignores lam."""
    return _power(mean, 0.0, eps)


def square_root(mean: Tensor, total: Tensor, lam: float, eps: float) -> Tensor:
    """`sqrt x`."""
    return mean.sqrt()


def yeo_johnson(mean: Tensor, total: Tensor, lam: float, eps: float) -> Tensor:
    """Yeo-Johnson for `x >= 0`: `((x + 1)^lam - 1) / lam`, and `log(x + 1)` at lam 0.

    Source: Yeo and Johnson, "A New Family of Power Transformations", 2000.
    """
    log1p = mean.log1p()
    return log1p if lam == 0 else log1p.mul_(lam).expm1_().div_(lam)


def _yeo_johnson_bounds(lam: float, eps: float) -> tuple[float, float]:
    return 0.0, math.log(2) if lam == 0 else (2**lam - 1) / lam


def z_score(mean: Tensor, total: Tensor, lam: float, eps: float) -> Tensor:
    """`(x - m) / max(s, eps)`; m and s: mean and standard deviation of a map's causal pairs."""
    length = mean.shape[-1]
    pairs = length * (length + 1) / 2
    centre = mean.tril().sum((-2, -1), keepdim=True) / pairs
    deviation = mean - centre
    spread = (deviation.tril().square_().sum((-2, -1), keepdim=True) / pairs).sqrt_()
    return deviation.div_(spread.clamp_min(eps))


def _unbounded(lam: float, eps: float) -> tuple[float, float]:
    return -math.inf, math.inf


def min_max(mean: Tensor, total: Tensor, lam: float, eps: float) -> Tensor:
    """`(x - a) / max(b - a, eps)` with a and b the extremes of a map's causal pairs."""
    causal = torch.ones_like(mean, dtype=torch.bool).tril_()
    high = mean.masked_fill(~causal, -math.inf).amax((-2, -1), keepdim=True)
    low = mean.masked_fill(~causal, math.inf).amin((-2, -1), keepdim=True)
    return (mean - low).div_((high - low).clamp_min(eps))


def arcsinh(mean: Tensor, total: Tensor, lam: float, eps: float) -> Tensor:
    """`log(x + sqrt(x^2 + 1))`."""
    return mean.asinh()


#: Every amplifier by its name in `Settings.amplify`.
AMPLIFIERS: dict[str, Amplifier] = {
    "box-cox": Amplifier(box_cox, _box_cox_bounds),
    "mean": Amplifier(average, _unit),
    "sum": Amplifier(raw_sum, lambda lam, eps: (0.0, math.inf)),
    "log": Amplifier(logarithm, lambda lam, eps: (0.0, -math.log(eps))),
    "sqrt": Amplifier(square_root, _unit),
    "yeo-johnson": Amplifier(yeo_johnson, _yeo_johnson_bounds),
    "z-score": Amplifier(z_score, _unbounded),
    "min-max": Amplifier(min_max, _unit),
    "arcsinh": Amplifier(arcsinh, lambda lam, eps: (0.0, math.asinh(1.0))),
}


def amplify(
    mean: Tensor,
    total: Tensor,
    settings: Settings,
    *,
    layer: int | None = None,
    first_head: int = 0,
) -> Tensor:
    """Amplify one layer's maps with `settings.amplify`.

    Args:
        mean: `[H, L, L]` mean probabilities; what stands above the diagonal does not count.
        total: `[H, L, L]` summed probabilities (only "sum" reads them).
        settings: Names the amplifier, its `lam` and `eps`.
        layer: The layer's index, for error messages.
        first_head: The number of the first of these heads in its layer, for error messages.

    Returns:
        `[H, L, L]` float32, 0 above the diagonal.

    Raises:
        ValueError: A map holds NaN, infinity or a value that is no probability.
    """
    if mean.shape != total.shape or mean.ndim != 3 or mean.shape[-2] != mean.shape[-1]:
        raise ValueError(
            f"mean and total must both be [H, L, L], got {list(mean.shape)} and {list(total.shape)}"
        )
    mean = mean.detach().float()
    total = total.detach().float()
    where = "the maps" if layer is None else f"layer {layer}"
    for values in (mean, total):
        bad = (~values.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{where}, head {first_head + bad[0]} ({len(bad)} of {len(mean)} heads): the"
                " attention map holds NaN or infinity; run the model in float32 or bfloat16 and"
                " check its weights"
            )
    bad = ((mean < 0) | (mean > 1 + _ABOVE_ONE)).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{where}, head {first_head + bad[0]}: the attention map has values outside [0, 1];"
            " pass probabilities (after the softmax), not logits"
        )
    amplified = AMPLIFIERS[settings.amplify].apply(mean, total, settings.lam, settings.eps)
    return torch.tril(amplified)
