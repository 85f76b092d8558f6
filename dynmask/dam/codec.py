"""Turn a layer of a plan into a json record and flat tensors, and back with every check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynmask.dam.layer import PREVIEW_SIZE, LayerPlan

_SHARES = ("coverage", "tail_coverage", "corner_coverage")
_RECORD = {
    "layer": lambda v: is_int(v, 0, 2**20),
    **dict.fromkeys(_SHARES, lambda v: _is_list(v, is_share)),
    "gate": lambda v: _is_list(v, lambda item: isinstance(item, bool)),
}


def encode_layer(index: int, layer: LayerPlan) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a layer's json record and its tensors, keyed `{index}.{name}`.

    Ragged lists become int32 `values` and `indptr` (head h owns `values[indptr[h]:indptr[h + 1]]`);
    the corner becomes bits, its lower triangle row by row, each head padded to a whole byte.
    """
    record: dict[str, Any] = {"layer": index}
    record |= {name: getattr(layer, name).tolist() for name in (*_SHARES, "gate")}
    # Copies: safetensors refuses tensors that share memory, as layers may.
    tensors = {"corner": _pack_corner(layer.corner), "previews": layer.previews.clone()}
    for name in ("columns", "offsets"):
        ragged: tuple[Tensor, ...] = getattr(layer, name)
        sizes = torch.tensor([0, *(len(item) for item in ragged)])
        tensors[f"{name}.values"] = torch.cat(ragged).to(torch.int32)
        tensors[f"{name}.indptr"] = sizes.cumsum(0).to(torch.int32)
    return record, {f"{index}.{name}": value.contiguous() for name, value in tensors.items()}


def check_record(record: object) -> dict[str, Any]:
    """Return a layer's json record if it is one that `encode_layer` makes.

    Raises:
        ValueError: Names the field at fault.
    """
    checked = check_fields(record, _RECORD, "layers")
    for name in _SHARES:
        if len(checked[name]) != len(checked["gate"]):
            raise ValueError(
                f"layer {checked['layer']}: {name} has {len(checked[name])} heads, gate"
                f" {len(checked['gate'])}"
            )
    return checked


def decode_layer(record: dict[str, Any], tensors: dict[str, Tensor], *, length: int) -> LayerPlan:
    """Rebuild a layer and take its tensors out of `tensors`.

    Args:
        record: The json record, as `check_record` returns it.
        tensors: All tensors of the file, not yet trusted; the layer's are removed.
        length: L, the capture length.

    Raises:
        ValueError: A tensor is not what `encode_layer` makes.
    """
    index, heads = record["layer"], len(record["gate"])
    where = f"layer {index}"

    def take(name: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> Tensor:
        value = tensors.pop(f"{index}.{name}", None)
        if value is None:
            raise ValueError(f"{where}: tensor {name!r} is missing")
        fits = value.ndim == len(shape) and all(
            want in (None, have) for want, have in zip(shape, value.shape, strict=True)
        )
        if not fits or value.dtype != dtype:
            raise ValueError(
                f"{where}: tensor {name!r} must be {list(shape)} {dtype}, got {list(value.shape)}"
                f" {value.dtype}"
            )
        return value

    side = min(length, PREVIEW_SIZE)
    bits = take("corner", (heads, _corner_bytes(length)), torch.uint8)
    previews = take("previews", (2, heads, side, side), torch.float16)
    ragged = {}
    for name in ("columns", "offsets"):
        indptr = take(f"{name}.indptr", (heads + 1,), torch.int32).long()
        values = take(f"{name}.values", (None,), torch.int32).long()
        if indptr[0] != 0 or indptr[-1] != len(values) or (indptr.diff() < 0).any():
            raise ValueError(f"{where}: {name}.indptr does not partition {name}.values")
        ragged[name] = tuple(part.clone() for part in values.split(indptr.diff().tolist()))
    try:
        return LayerPlan(
            columns=ragged["columns"],
            offsets=ragged["offsets"],
            corner=_unpack_corner(bits, length),
            gate=torch.tensor(record["gate"], dtype=torch.bool),
            previews=previews,
            **{name: torch.tensor(record[name], dtype=torch.float32) for name in _SHARES},
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def largest_file(records: list[dict[str, Any]], *, length: int) -> int:
    """Return the most bytes that the tensors of `records` may take, header included."""
    heads = sum(len(record["gate"]) for record in records)
    side = min(length, PREVIEW_SIZE)
    ragged = 2 * 4 * (length + 2)
    header = 4096 * (len(records) + 1)
    return heads * (_corner_bytes(length) + 2 * 2 * side * side + ragged) + header


def check_fields(
    record: object, fields: dict[str, Callable[[Any], bool]], where: str
) -> dict[str, Any]:
    """Return `record` if it is a dict with exactly `fields`, each accepted by its test.

    Raises:
        ValueError: Names the field at fault.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be an object, got {type(record).__name__}")
    missing, unknown = sorted(fields.keys() - record.keys()), sorted(record.keys() - fields.keys())
    if missing or unknown:
        raise ValueError(f"{where}: missing {missing}, unknown {unknown}")
    for name, accepts in fields.items():
        if not accepts(record[name]):
            raise ValueError(f"{where}: {name} has the wrong type or range: {record[name]!r:.80}")
    return record


def depth(value: object) -> int:
    """Return how deep lists and dicts are nested; 0 for anything else."""
    level, found = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        found += 1
        level = [
            part for item in level for part in (item.values() if isinstance(item, dict) else item)
        ]
    return found


def is_int(value: object, low: int, high: int) -> bool:
    """True for an int (no bool) in `[low, high]`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_share(value: object) -> bool:
    """True for a number in `[0, 1]`."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_list(value: object, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(accepts(item) for item in value)


def _corner_bytes(length: int) -> int:
    return (length * (length + 1) // 2 + 7) // 8


def _pack_corner(corner_HLL: Tensor) -> Tensor:
    lower = np.tri(corner_HLL.shape[-1], dtype=bool)
    return torch.from_numpy(
        np.stack([np.packbits(head[lower]) for head in corner_HLL.contiguous().numpy()])
    )


def _unpack_corner(bits_HN: Tensor, length: int) -> Tensor:
    lower = np.tri(length, dtype=bool)
    pairs = length * (length + 1) // 2
    corner = np.zeros((len(bits_HN), length, length), dtype=bool)
    for head, bits in zip(corner, bits_HN.numpy(), strict=True):
        head[lower] = np.unpackbits(bits, count=pairs)
    return torch.from_numpy(corner)
