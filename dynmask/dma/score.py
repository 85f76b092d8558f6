"""The score of a key, read from the values of its token alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCORES = ("exp", "linear")
"""The forms of the score: ``exp(A softplus(dt))``, and ``A softplus(dt)``."""


class ValueScore(nn.Module):
    r"""Score every key by the values of its token: ``delta[b, g, j]``, the same for all queries.

    ``dt[b, j] = Wdt concat_g(v[b, g, j])``, then ``exp(A_g softplus(dt[b, j, g]))`` or, without the
    exp, ``A_g softplus(dt[b, j, g])``. Each kv head's score sees the values of all kv heads. Values
    carry no position, so neither does the score.

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
            score = step.exp() if self.form == "exp" else step
            return score.transpose(1, 2)

    def extra_repr(self) -> str:
        """Return what ``repr`` shows of it."""
        return f"form={self.form!r}"
