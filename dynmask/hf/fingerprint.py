"""Tell one model from another, whatever dtype it is loaded in."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import Tensor, nn

from dynmask.hf.compat import attention_layers, text_config
from dynmask.hf.parallel import whole

_PARAMETERS_PER_KIND = 2
_VALUES_PER_PARAMETER = 8
# bf16 keeps 8 significant bits: rounding moves a value by at most 2^-9 of itself, and twice that
# when one side was rounded to bf16 and the other to fp16. Smallest fp16 step: 2^-24.
_RELATIVE, _ABSOLUTE = 2.0**-8, 2.0**-24


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Describe the model that attention maps belong to.

    Configuration facts that shape the maps, and a sample of weights: of every kind of matrix
    (parameter names with their numbers left out) two parameters far apart in depth, and of each
    eight values spread evenly over it. Weights on the meta device (offloaded) are left out; those
    that are spread over processes are gathered, one by one, so all processes must call.

    Args:
        model: A causal language model of transformers.

    Returns:
        A dict of plain values, fit for json.

    Raises:
        ValueError: If the model has no attention layer that dynmask knows.
    """
    config = text_config(model)
    layers = attention_layers(model)
    facts = {
        "architecture": type(model).__name__,
        "model_type": config.model_type,
        "attention_layers": [layer.index for layer in layers],
        "own_windows": [layer.own_window for layer in layers],
        "heads": config.num_attention_heads,
        "kv_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "head_dim": getattr(layers[0].module, "head_dim", None),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "rope": getattr(config, "rope_parameters", None),
    }
    # Through json once, so that a stored fingerprint compares equal (tuples, integer keys).
    plain: dict[str, Any] = json.loads(json.dumps(facts, sort_keys=True, default=str))
    plain["weights"] = {name: _sample(weight) for name, weight in _chosen(model)}
    return plain


def check_fingerprint(model: nn.Module, fingerprint: dict[str, Any]) -> None:
    """Check that a fingerprint was taken from this model.

    Weights may differ by what rounding to bf16 or fp16 does, not more: relative 2^-8.

    Args:
        model: The model at hand.
        fingerprint: What ``fingerprint(model)`` returned earlier.

    Raises:
        ValueError: Naming what differs.
    """
    differences = compare(_fingerprint(model), fingerprint)
    if differences:
        raise ValueError(
            f"the plan was made for another model ({'; '.join(differences[:4])}): "
            "calibrate this model, or load the model that the plan was made for"
        )


def compare(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """List what differs between two fingerprints, in words; empty if they are of one model."""
    differences = [
        f"{key}: {here.get(key)} here, {there.get(key)} in the plan"
        for key in sorted((here.keys() | there.keys()) - {"weights"})
        if here.get(key) != there.get(key)
    ]
    ours, theirs = here.get("weights", {}), there.get("weights", {})
    if not isinstance(theirs, dict):
        return [*differences, "weights: no mapping in the plan"]
    # An offloaded weight can be missing on one side; a renamed or unknown one on both differs.
    shared = sorted(ours.keys() & theirs.keys())
    if not shared and (ours or theirs):
        differences.append("no weight name in common")
    for name in shared:
        a = torch.tensor(ours[name], dtype=torch.float64)
        try:
            b = torch.tensor(theirs[name], dtype=torch.float64)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            differences.append(f"weight {name}: no numbers in the plan")
            continue
        if a.shape != b.shape:
            differences.append(f"weight {name}: another size")
        elif not torch.allclose(a, b, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True):
            differences.append(f"weight {name}: other values")
    return differences


_fingerprint = fingerprint  # `check_fingerprint` has an argument of that name


def _chosen(model: nn.Module) -> list[tuple[str, Tensor]]:
    kinds: dict[str, list[tuple[str, Tensor]]] = {}
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and weight.device.type != "meta":
            kinds.setdefault(re.sub(r"\d+", "#", name), []).append((name, weight))
    chosen = []
    for place, kind in enumerate(sorted(kinds)):
        weights = kinds[kind]
        # Kinds start at different depths, so that together they touch most layers.
        for step in range(min(_PARAMETERS_PER_KIND, len(weights))):
            at = place + step * len(weights) // _PARAMETERS_PER_KIND
            chosen.append(weights[at % len(weights)])
    return chosen


def _sample(weight: Tensor) -> list[float]:
    flat = whole(weight.detach()).reshape(-1)
    steps = torch.arange(_VALUES_PER_PARAMETER, dtype=torch.float64) + 0.5
    places = (steps / _VALUES_PER_PARAMETER * len(flat)).long().to(flat.device)
    return [float(value) for value in flat[places].double().cpu()]
