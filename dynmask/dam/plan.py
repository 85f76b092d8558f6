"""The plan: everything that calibration found out about one model."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dynmask
from dynmask.dam import store
from dynmask.dam.codec import (
    check_fields,
    check_record,
    decode_layer,
    depth,
    encode_layer,
    is_int,
    largest_file,
)
from dynmask.dam.gate import gate_heads
from dynmask.dam.inspect import inspect_plan
from dynmask.dam.layer import LayerPlan
from dynmask.dam.settings import Settings
from dynmask.masks import Stripes

MODES = ("static", "auto", "dense")
# Whoever reads a fingerprint later may recurse into it.
_MAX_DEPTH = 16

_DATA = {
    "sha256": store.is_sha256,
    "texts": lambda v: is_int(v, 1, 2**53),
    "tokens": lambda v: is_int(v, 1, 2**53),
    "holdout": lambda v: is_int(v, 0, 2**53),
    "holdout_length": lambda v: is_int(v, 0, 2**53),
}
_BODY = {
    "format": lambda v: v == store.FORMAT,
    "version": lambda v: v == store.VERSION,
    "dynmask": lambda v: isinstance(v, str),
    "created": lambda v: isinstance(v, str),
    "fingerprint": lambda v: isinstance(v, dict),
    "settings": lambda v: isinstance(v, dict),
    "data": lambda v: isinstance(v, dict),
    "layers": lambda v: isinstance(v, list) and len(v) > 0,
    "tensors": lambda v: isinstance(v, dict),
    "sha256": store.is_sha256,
}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """Masks for one model, with all that is needed to trace and to check them.

    Attributes:
        fingerprint: What identifies the model; plain json values.
        settings: How the plan was made.
        data: What it was made from, as `describe_data` gives it.
        layers: Layer index to its plan, ascending; H and L are the same in all.
        created: UTC time, ISO 8601.
        dynmask_version: The version of dynmask that made it.

    Raises:
        ValueError: A part does not fit the others; the message names it.
    """

    fingerprint: dict[str, Any]
    settings: Settings
    data: dict[str, Any]
    layers: dict[int, LayerPlan]
    created: str = field(default_factory=_now)
    dynmask_version: str = dynmask.__version__

    def __post_init__(self) -> None:
        try:
            # What json would change (tuples, number keys) changes now, not at the next load.
            plain = json.loads(store.canonical(self.fingerprint))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"fingerprint must hold plain json values: {error}") from error
        if depth(plain) > _MAX_DEPTH:
            raise ValueError(f"fingerprint is nested deeper than {_MAX_DEPTH} levels")
        object.__setattr__(self, "fingerprint", plain)
        check_fields(self.data, _DATA, "data")
        if not self.layers:
            raise ValueError("layers must hold at least one layer")
        object.__setattr__(self, "layers", dict(sorted(self.layers.items())))
        heads = next(iter(self.layers.values())).heads
        for index, layer in self.layers.items():
            if not is_int(index, 0, 2**20):
                raise ValueError(f"layers: {index!r} is no layer index")
            if layer.heads != heads or layer.capture_length != self.settings.capture_length:
                raise ValueError(
                    f"layer {index} has {layer.heads} heads and capture length"
                    f" {layer.capture_length}; expected {heads} and {self.settings.capture_length}"
                )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the plan to a folder as json and safetensors, whole or not at all.

        Args:
            folder: An absent or empty folder, or one with a plan, which is replaced.

        Raises:
            ValueError: The folder holds something else or cannot be written.
            OSError: Writing failed midway; an older plan there is intact.
        """
        records = []
        tensors: dict[str, Tensor] = {}
        for index, layer in self.layers.items():
            record, of_layer = encode_layer(index, layer)
            records.append(record)
            tensors |= of_layer
        body = {
            "dynmask": self.dynmask_version,
            "created": self.created,
            "fingerprint": self.fingerprint,
            "settings": self.settings.to_dict(),
            "data": self.data,
            "layers": records,
        }
        store.write(folder, body, tensors)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> MaskPlan:
        """Read a plan and verify all of it: version, hashes, types, ranges, sizes.

        Nothing is unpickled, and no size is believed before it is checked.

        Raises:
            ValueError: Names the file and the fault.
        """
        body = store.read_json(folder)
        path = os.path.join(folder, store.JSON_NAME)
        try:
            check_fields(body, _BODY, "plan")
            settings = Settings.from_dict(body["settings"])
            length = settings.capture_length
            records = [check_record(record) for record in body["layers"]]
            most = largest_file(records, length=length)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        tensors = store.read_tensors(folder, body["tensors"], most_bytes=most)
        try:
            layers = {
                record["layer"]: decode_layer(record, tensors, length=length) for record in records
            }
            if tensors:
                raise ValueError(f"unknown tensors in {body['tensors']['file']}: {[*tensors][:4]}")
            return cls(
                fingerprint=body["fingerprint"],
                settings=settings,
                data=body["data"],
                layers=layers,
                created=body["created"],
                dynmask_version=body["dynmask"],
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def stripes(self, layer: int, mode: str, device: torch.device | str | None = None) -> Stripes:
        """Return a layer's mask.

        Args:
            layer: The layer's index.
            mode: "static" (every head on its stripes), "auto" (the gate's heads dense) or "dense".
            device: Where to put it; the CPU by default.

        Returns:
            Stripes without padding; the corner is left out where every head is dense.

        Raises:
            ValueError: The plan does not hold the layer, or the mode is unknown.
        """
        if layer not in self.layers:
            raise ValueError(f"layer={layer} is not in the plan; it holds {[*self.layers]}")
        plan = self.layers[layer]
        full_H = full_heads(plan, mode)
        mask = Stripes(
            columns=plan.columns,
            offsets=plan.offsets,
            full_heads=full_H,
            corner=None if full_H.all() else plan.corner,
        )
        return mask if device is None else mask.to(device)

    def density(self, length: int, mode: str) -> Tensor:
        """Return visible over causal pairs at a length, `[n_layers, H]` float64.

        In mode `auto` gated heads count as dense: what they read depends on the input.
        """
        return torch.stack([self.stripes(layer, mode).density(length) for layer in self.layers])

    def with_coverage(self, target: float) -> MaskPlan:
        """Return the plan gated again by another coverage target; nothing is measured anew.

        Raises:
            ValueError: The target is not in (0, 1].
        """
        settings = dataclasses.replace(self.settings, coverage=target)
        layers = {
            index: dataclasses.replace(layer, gate=gate_heads(layer.coverage, target))
            for index, layer in self.layers.items()
        }
        return dataclasses.replace(self, settings=settings, layers=layers)

    def inspect(self) -> dict[str, Any]:
        """Return a summary of plain values; see `dynmask.dam.inspect.inspect_plan`."""
        return inspect_plan(self)


def full_heads(layer: LayerPlan, mode: str) -> Tensor:
    """Return `[H]` bool, the heads that a mode runs dense.

    Raises:
        ValueError: The mode is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; use one of {MODES}")
    if mode == "auto":
        return layer.gate.clone()
    return torch.full_like(layer.gate, mode == "dense")


def describe_data(token_ids: Sequence[Sequence[int]], *, holdout: int) -> dict[str, Any]:
    """Describe what a plan was made from.

    Args:
        token_ids: The windows of text as they were run, held-out ones last.
        holdout: How many of them were held out.

    Returns:
        `sha256` over every window's length and ids as little-endian int64; the number of `texts`
        (windows), `tokens` and `holdout` windows; and `holdout_length`, tokens of the longest
        held-out window: what is said about coverage holds up to there.
    """
    digest = hashlib.sha256()
    for ids in token_ids:
        digest.update(np.asarray([len(ids), *ids], dtype="<i8").tobytes())
    return {
        "sha256": digest.hexdigest(),
        "texts": len(token_ids),
        "tokens": sum(len(ids) for ids in token_ids),
        "holdout": holdout,
        "holdout_length": max(
            (len(ids) for ids in token_ids[len(token_ids) - holdout :]), default=0
        ),
    }
