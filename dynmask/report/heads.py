"""What the page says about each head of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynmask.dam import MaskPlan

#: The second length at which a head's density is given, in tokens.
LONG_LENGTH = 8192


@dataclass(frozen=True)
class HeadView:
    """The figures of one head; shares are 0 to 1.

    Attributes:
        layer: The layer's index in the model.
        head: The head's index in the layer.
        coverage: Share of the held-out attention that columns and offsets keep.
        tail_coverage: The same over the worst tenth of the rows.
        corner_coverage: The same in the rows of the captured corner.
        columns: Number of columns.
        offsets: Number of offsets.
        density: Static density at the capture length.
        density_long: Static density at `LONG_LENGTH` tokens.
        gated: True where mode "auto" does not run the head static.
    """

    layer: int
    head: int
    coverage: float
    tail_coverage: float
    corner_coverage: float
    columns: int
    offsets: int
    density: float
    density_long: float
    gated: bool

    @property
    def gate(self) -> str:
        """The gate's decision in a word."""
        return "gated" if self.gated else "static"

    @property
    def row(self) -> str:
        """Name of the head's row in the table of all heads."""
        return f"row-{self.layer}-{self.head}"


def head_views(plan: MaskPlan) -> list[HeadView]:
    """Collect the figures of every head of a plan, layer by layer."""
    views = []
    for layer, part in plan.layers.items():
        # One mask for both lengths: what it works out of its corner is kept.
        mask = plan.stripes(layer, "static")
        density_H = mask.density(part.capture_length)
        density_long_H = mask.density(LONG_LENGTH)
        views += [
            HeadView(
                layer=layer,
                head=head,
                coverage=float(part.coverage[head]),
                tail_coverage=float(part.tail_coverage[head]),
                corner_coverage=float(part.corner_coverage[head]),
                columns=len(part.columns[head]),
                offsets=len(part.offsets[head]),
                density=float(density_H[head]),
                density_long=float(density_long_H[head]),
                gated=bool(part.gate[head]),
            )
            for head in range(part.heads)
        ]
    return views


def check_comparable(plan: MaskPlan, other: MaskPlan) -> None:
    """Check that two plans have the same layers and heads.

    Raises:
        ValueError: They do not, so no head of one is a head of the other.
    """
    held = [(list(each.layers), next(iter(each.layers.values())).heads) for each in (plan, other)]
    if held[0] != held[1]:
        words = [f"{len(layers)} layers of {heads} heads" for layers, heads in held]
        if words[0] == words[1]:
            words = [f"the layers {layers}" for layers, _ in held]
        raise ValueError(
            f"compare has {words[1]}, the plan {words[0]}: compare two plans of one model"
        )
