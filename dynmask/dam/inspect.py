"""A plan in numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dynmask.dam.plan import MaskPlan

#: Lengths at which densities are reported, in tokens.
LENGTHS = (4096, 16384, 65536)


def inspect_plan(plan: MaskPlan) -> dict[str, Any]:
    """Summarise a plan as plain values, ready for json.

    Args:
        plan: The plan.

    Returns:
        `dynmask`, `created`, `fingerprint`, `settings`, `data`; `heads` and `gated_heads` of all
        layers; `density`: mode to length (as text) to the mean over heads, where `auto` counts
        gated heads as dense, the most that their dynamic masks can show; and `layers`, one dict
        each: `layer`, `heads`, `gated_heads`, `density` as above, and per head `columns` and
        `offsets` (their number), `coverage`, `tail_coverage`, `corner_coverage`, `gate`.
    """
    layers = []
    totals = {mode: dict.fromkeys(map(str, LENGTHS), 0.0) for mode in ("static", "auto")}
    for index, layer in plan.layers.items():
        mask = plan.stripes(index, "static")
        density: dict[str, dict[str, float]] = {"static": {}, "auto": {}}
        for length in LENGTHS:
            static_H = mask.density(length)
            auto_H = torch.where(layer.gate, 1.0, static_H)
            for mode, density_H in (("static", static_H), ("auto", auto_H)):
                density[mode][str(length)] = density_H.mean().item()
                totals[mode][str(length)] += density_H.mean().item()
        layers.append(
            {
                "layer": index,
                "heads": layer.heads,
                "gated_heads": int(layer.gate.sum()),
                "density": density,
                "columns": [len(item) for item in layer.columns],
                "offsets": [len(item) for item in layer.offsets],
                "coverage": layer.coverage.tolist(),
                "tail_coverage": layer.tail_coverage.tolist(),
                "corner_coverage": layer.corner_coverage.tolist(),
                "gate": layer.gate.tolist(),
            }
        )
    return {
        "dynmask": plan.dynmask_version,
        "created": plan.created,
        "fingerprint": plan.fingerprint,
        "settings": plan.settings.to_dict(),
        "data": plan.data,
        "heads": sum(layer.heads for layer in plan.layers.values()),
        "gated_heads": sum(int(layer.gate.sum()) for layer in plan.layers.values()),
        # Every layer has the same number of heads, so the mean of means is the mean over heads.
        "density": {
            mode: {length: total / len(layers) for length, total in of_mode.items()}
            for mode, of_mode in totals.items()
        },
        "layers": layers,
    }
