"""MoA: first keys and a window for each head, its width a linear function of the length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dynmask.baselines.moa_spans import choose_rules, span_at, span_density
from dynmask.baselines.policy import Policy, Selector
from dynmask.masks import Stripes

Table = tuple[tuple[float, ...], ...]
"""A number for each layer and query head."""


@dataclass(frozen=True)
class MoA(Policy):
    """Elastic spans: at length ``N`` head ``h`` of a layer sees ``alpha_h + beta_h N`` keys.

    These are the first ``sinks`` keys and the nearest ones, the own key at least. ``N`` is the
    number of keys at the end of the call, for all of its rows. So a single row sees what the last
    row of a prefill would see, and as spans grow by at most a key a token, a key that left a span
    does not come back in decode. The early rows of a chunk may see keys that rows before the
    chunk, at a smaller ``N``, did not.

    Args:
        alpha: Keys, for each layer and query head; may be negative.
        beta: Share of the length, in [0, 1], likewise.
        sinks: First keys; they count towards the span.

    Raises:
        ValueError: The tables do not fit together, or a value is out of its range.

    Source: Fu et al., MoA: Mixture of Sparse Attention for Automatic Large Language Model
    Compression, arXiv 2406.14909.
    """

    alpha: Table
    beta: Table
    sinks: int = 64

    name: ClassVar[str] = "moa"
    paper: ClassVar[str] = "2406.14909"
    selects: ClassVar[str] = "first tokens and a window of each head's own width"
    stages: ClassVar[tuple[str, ...]] = ("prefill", "decode")

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            # Result files give lists back.
            table = tuple(tuple(map(float, row)) for row in getattr(self, name))
            object.__setattr__(self, name, table)
        if not self.alpha or [len(row) for row in self.alpha] != [len(row) for row in self.beta]:
            raise ValueError(
                "alpha and beta must both hold one row per layer with one number per query head, "
                f"got rows of {[len(row) for row in self.alpha]} and "
                f"{[len(row) for row in self.beta]} numbers"
            )
        if not all(math.isfinite(value) for row in self.alpha for value in row):
            raise ValueError("alpha must be finite everywhere")
        if not all(0 <= value <= 1 for row in self.beta for value in row):
            raise ValueError("beta must lie in [0, 1] everywhere: a span grows with the length")
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must not be negative")

    @classmethod
    def from_influence(
        cls,
        influence: Tensor,
        *,
        rules: Sequence[tuple[float, float]],
        lengths: Sequence[int],
        density: float,
        sinks: int = 64,
    ) -> MoA:
        r"""Choose a rule for every head so that the influence of what is hidden is least.

        A profile is made on texts of several lengths: for each text one forward and one backward
        pass of dense attention, whose maps are ``A``, with gradients ``G = dL/dA`` of the text's
        loss. To first order, hiding key ``j`` from row ``i``, the rest of the row renormalised,
        changes the loss by

        .. math:: E_{ij} = \frac{A_{ij}}{1 - A_{ij}} \Big(\sum_n A_{in} G_{in} - G_{ij}\Big)

        and ``influence[l, h, r, n]`` is the sum of ``E`` over the pairs ``j <= i`` that rule
        ``r`` hides from head ``h`` of layer ``l`` at ``N = lengths[n]``, the mean of all texts of
        that length. The authors' code sums ``|E|``. `dynmask.baselines.moa_spans.span_at` says
        which pairs: a row hides those between the first ``sinks`` and its nearest
        ``span - sinks`` keys.

        Influence and density are means over the lengths. The paper bounds the density at each
        length, and picks among several plans by a validation on longer text. The authors' code
        counts density as span over length, and gives the heads of a layer at most two rules.

        Args:
            influence: ``[layers, heads, rules, lengths]`` float.
            rules: Candidates ``(alpha, beta)``. The authors' code takes alpha from minus the
                shortest length to the longest in steps of about 1,024, with 9 values of beta from
                0 to 1.
            lengths: Tokens of the profile's texts.
            density: In (0, 1]: at most so many of the causal pairs, the mean of all heads.
            sinks: First keys that every row sees.

        Returns:
            Spans within the budget, see `dynmask.baselines.moa_spans.choose_rules`.

        Raises:
            ValueError: Shapes do not fit, a number is not finite, or no choice keeps to the budget.
        """
        shape = (len(rules), len(lengths))
        if influence.dim() != 4 or influence.shape[2:] != shape or influence.numel() == 0:
            raise ValueError(
                f"influence must be [layers, heads, {shape[0]} rules, {shape[1]} lengths], got "
                f"{list(influence.shape)}"
            )
        if not 0 < density <= 1:
            raise ValueError(f"density={density} must be above 0 and at most 1")
        if not bool(influence.isfinite().all()):
            raise ValueError("influence is not finite everywhere: mask A = 1 out of E, and NaNs")
        cost = [
            sum(span_density(span_at(a, b, n, sinks=sinks), n) for n in lengths) / len(lengths)
            for a, b in rules
        ]
        loss = influence.double().mean(-1).flatten(0, 1).tolist()
        heads = influence.shape[1]
        flat = choose_rules(loss, cost, budget=density)
        chosen = [flat[top : top + heads] for top in range(0, len(flat), heads)]
        alpha, beta = (
            tuple(tuple(float(rules[r][part]) for r in row) for row in chosen) for part in (0, 1)
        )
        return cls(alpha, beta, sinks)

    def selector(self, layer: int, layers: int) -> Selector:
        """Return the choice of one layer, from its rows of the tables."""
        if layers != len(self.alpha):
            raise ValueError(
                f"alpha and beta hold {len(self.alpha)} layers but the model has {layers}: make "
                "them from a profile of this model"
            )
        return _MoA(self.alpha[layer], self.beta[layer], self.sinks)


class _MoA(Selector):
    remembers = False

    def __init__(self, alpha: tuple[float, ...], beta: tuple[float, ...], sinks: int):
        super().__init__()
        self._rules = tuple(zip(alpha, beta, strict=True))
        self._sinks = sinks
        self._made: tuple[tuple[int, ...], Stripes] | None = None

    def choose(
        self, q: Tensor, k: Tensor, state: None, *, scale: float
    ) -> tuple[Stripes | None, None]:
        k_len = k.shape[2]
        if q.shape[1] != len(self._rules):
            raise ValueError(
                f"alpha and beta hold {len(self._rules)} heads in this layer but q has "
                f"{q.shape[1]}: make them from a profile of this model"
            )
        spans = [span_at(a, b, k_len, sinks=self._sinks) for a, b in self._rules]
        # 0 for a head that sees all: then the mask says the same at any length.
        windows = tuple(0 if span == k_len else span - self._sinks for span in spans)
        if not any(windows):
            return None, None
        # The same windows are the same stripes: with them go on what an op derived from them.
        if self._made is None or self._made[0] != windows:
            self._made = windows, self._stripes(windows, k.device)
        return self._made[1], None

    def _stripes(self, windows: tuple[int, ...], device: torch.device) -> Stripes:
        near = torch.arange(max(windows), device=device)
        return Stripes(
            columns=(torch.arange(self._sinks, device=device),) * len(windows),
            offsets=tuple(near[: max(window, 1)] for window in windows),
            full_heads=torch.tensor([window == 0 for window in windows], device=device),
        )
