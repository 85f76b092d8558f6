"""The score of a key, read from the values of its token alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCORES = ("exp", "linear")
"""The forms of the score: ``exp(A softplus(dt))``, and ``A softplus(dt)``."""

STEEP = 5.0
"""The exponent from which on ``exp`` goes on as its tangent."""


class ValueScore(nn.Module):
    r"""Score every key by the values of its token: ``delta[b, g, j]``, the same for all queries.

    ``dt[b, j] = Wdt concat_g(v[b, g, j])``, then ``exp(A_g softplus(dt[b, j, g]))`` or, without the
    exp, ``A_g softplus(dt[b, j, g])``. Each kv head's score sees the values of all kv heads. Values
    carry no position, so neither does the score.

    Beyond the exponent `STEEP`, from a score of 148 on, the tangent of exp takes its place:
    ``e^5 (1 + x - 5)`` for ``x > 5``, which keeps the order and a gradient. A score is a bias of
    logits, where a lead of 20 is all there is to gain; in training at a high rate exp grows on,
    until float32 has no digits left for the rest of a logit.

    Computed in float32 (float64 for float64 values) whatever the dtype of values and weights, and
    outside autocast: in bfloat16 thousands of keys share a handful of scores, and the selection
    would be by order of arrival.

    Args:
        groups: ``G``, kv heads.
        head_dim: ``d``, width of a head.
        form: ``"exp"`` (the paper's) or ``"linear"`` (its authors' later kernels).
        std: Standard deviation of the initial ``Wdt`` and ``A``. With ``A = 0`` all keys tie and
            ``Wdt`` has no gradient, which is why ``A`` does not start there.
        a_std: That of ``A``, if it is another.

    Raises:
        ValueError: If ``form`` is neither.

    Attributes:
        own_heads: None, or under tensor parallelism what sums ``Wdt v`` over the processes and
            returns the part of this one's kv heads.

    Source: DMA, arXiv 2508.02124, section 3.1.
    """

    own_heads: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        groups: int,
        head_dim: int,
        *,
        form: str = "exp",
        std: float = 0.02,
        a_std: float | None = None,
    ):
        super().__init__()
        if form not in SCORES:
            raise ValueError(f'score="{form}" is not known: use one of {list(SCORES)}')
        self.form = form
        self.dt_proj = nn.Linear(groups * head_dim, groups, bias=False)
        self.A = nn.Parameter(torch.empty(groups))
        nn.init.normal_(self.dt_proj.weight, std=std)
        nn.init.normal_(self.A, std=std if a_std is None else a_std)

    def forward(self, values: Tensor) -> Tensor:
        """Return the scores.

        Args:
            values: ``[B, G, N, d]``; under tensor parallelism of this process's kv heads.

        Returns:
            ``[B, G, N]``, float32 (or float64), differentiable in the values, ``A`` and ``Wdt``.
        """
        weight: Any = self.dt_proj.weight
        factor: Any = self.A
        if self.own_heads is not None:
            weight, factor = weight.to_local(), factor.to_local()
        dtype = torch.promote_types(values.dtype, torch.float32)
        with torch.autocast(values.device.type, enabled=False):
            flat = values.transpose(1, 2).flatten(2).to(dtype)
            dt = F.linear(flat, weight.to(dtype))
            if self.own_heads is not None:
                dt = self.own_heads(dt)
            step = F.softplus(dt) * factor.to(dtype)
            score = _bounded_exp(step) if self.form == "exp" else step
            return score.transpose(1, 2)

    def extra_repr(self) -> str:
        """Return what ``repr`` shows of it."""
        return f"form={self.form!r}"


def _bounded_exp(x: Tensor) -> Tensor:
    # Not a sum of both parts: their gradients would cancel, but for rounding.
    tangent = math.exp(STEEP) * (1 + (x - STEEP))
    return torch.where(x > STEEP, tangent, x.clamp(max=STEEP).exp())
