"""Tensor parallel models: each process holds some of a layer's heads, one run of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from dynmask.masks import Stripes


def heads_here(module: nn.Module, stripes: Stripes, heads: int) -> Stripes:
    """Return the stripes of the heads that this process computes.

    transformers (``tp_plan``) splits the projections of queries, keys and values by rows, so
    process ``r`` of ``P`` computes the query heads ``r H/P`` to ``(r + 1) H/P - 1`` and the kv
    heads that belong to them. Nothing else says so: the configuration still counts all heads.

    Args:
        module: The attention module, of whose weights some are DTensors.
        stripes: Of all heads of the layer, without padding.
        heads: Query heads that the module computed here.

    Raises:
        ValueError: If the heads are not split evenly over one mesh dimension.
    """
    rank, size = _place(module)
    if heads * size != stripes.heads:
        raise ValueError(
            f"{type(module).__name__} computes {heads} of {stripes.heads} heads on one of {size} "
            "processes, which dynmask cannot tell apart: load the model with transformers' "
            "tp_plan, over a number of processes that divides the heads"
        )
    return stripes.of_heads(range(rank * heads, (rank + 1) * heads))


def refuse_split(model: nn.Module, attention: Iterable[nn.Module]) -> None:
    """Refuse a model of whose heads this process computes only some, before anything is computed.

    Args:
        model: The model.
        attention: Its attention modules.

    Raises:
        ValueError: If a weight of theirs is split by tensor parallelism. Weights that FSDP shards
            are whole again when they are used.
    """
    for module in attention:
        for weight in module.parameters():
            mesh, axis = _split(weight, model)
            if mesh is not None:
                raise ValueError(
                    f"the model's heads are split over {mesh.size(axis)} processes (tensor "
                    "parallelism), and each would see its own alone: calibrate the model without a "
                    "tp_plan; the plan then serves the split model too"
                )


def split_group(model: nn.Module, attention: Iterable[nn.Module]) -> Any:
    """Return the process group that tensor parallelism splits a model's heads over, or None.

    Args:
        model: The model.
        attention: Its attention modules.
    """
    for module in attention:
        for weight in module.parameters():
            mesh, axis = _split(weight, model)
            if mesh is not None:
                return mesh.get_group(axis)
    return None


def whole(weight: Tensor) -> Tensor:
    """Return a weight in full, where it is spread over processes; all of them must ask for it."""
    gather: Any = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()


def _place(module: nn.Module) -> tuple[int, int]:
    """Return this process's number and how many there are, from where the module's weights lie."""
    for weight in module.parameters():
        mesh: Any = getattr(weight, "device_mesh", None)
        if mesh is None:
            continue
        if "tp" in (mesh.mesh_dim_names or ()):
            mesh = mesh["tp"]
        if mesh.ndim == 1:
            return mesh.get_local_rank(), mesh.size()
    return 0, 1


def _split(weight: Tensor, model: nn.Module) -> tuple[Any, int]:
    """Return the mesh, and its axis, over which tensor parallelism splits a weight; None if not."""
    mesh: Any = getattr(weight, "device_mesh", None)
    whole = None, 0
    if mesh is None:
        return whole
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        axis = names.index("tp")
    elif not names and mesh.ndim == 1 and not _is_fsdp(model):
        axis = 0  # transformers' own mesh, until it got names.
    else:
        return whole
    placements: Any = weight.placements  # type: ignore[attr-defined]
    return whole if placements[axis].is_replicate() or mesh.size(axis) == 1 else (mesh, axis)


def _is_fsdp(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())
