"""Masks that no function but dynmask's own can use, so that a call is never one half of each.

A run may be opened or closed by another thread while a call is between two layers. The layers that
follow then run another attention function, with the mask that was made for the first. Plain tensors
would be read by it as something else, without an error. These masks are no tensors, and what is
done with them raises; those of another run are refused, and so are tensors where ours should be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dynmask.hf import compat

_CHANGED = (
    "accelerate() was closed or opened while this call was inside the model (by another thread or "
    "a hook): call the model again, with a new cache; open and close a run while none is inside"
)


class CallMask:
    """The mask of one forward pass, shared by layers of one kind.

    Every use by a function that does not know it raises ``ValueError``, or ``AttributeError``
    where something is looked up in it.

    Attributes:
        ndim: Dimensions of what it stands for: transformers looks at them.
    """

    ndim: int

    def __init__(self) -> None:
        self._runs: list[object] = []

    def claim(self, run: object) -> None:
        """Take the mask for a run, at each of its layers; copies are taken with it.

        Raises:
            ValueError: A layer before this one ran in another run.
        """
        if not self._runs:
            self._runs.append(run)
        if self._runs[0] is not run:
            raise ValueError(_CHANGED)

    def to(
        self, device: Any = None, dtype: torch.dtype | None = None, **options: Any
    ) -> CallMask | Tensor:
        """Return a copy on a device; with a ``dtype``, the tensor that it stands for."""
        raise NotImplementedError

    def contiguous(self) -> CallMask:
        """Return the mask itself."""
        return self

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Refuse every function of torch."""
        raise ValueError(_CHANGED)

    def __getitem__(self, index: Any) -> NoReturn:
        """Refuse to be cut."""
        raise ValueError(
            "the model's own code reads its attention mask (a sparse indexer, Gemma 4), which "
            f"dynmask does not support: use this model without it. Or {_CHANGED}"
        )

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse what a tensor has besides."""
        raise AttributeError(f"{type(self).__name__}.{name}: {_CHANGED}")


class OwnMask(CallMask):
    """A mask that transformers made for its ``sdpa`` function: a local window, packing, overlays.

    Args:
        mask: ``[B, 1, Q, K]`` bool; None where a local window is not yet full.
    """

    ndim = 4

    def __init__(self, mask: Tensor | None):
        super().__init__()
        self.mask = mask

    def to(
        self, device: Any = None, dtype: torch.dtype | None = None, **options: Any
    ) -> OwnMask | Tensor:
        """Return a copy on a device; there is no tensor that says the same to all functions."""
        if dtype is not None:
            raise ValueError(_CHANGED)
        copy = OwnMask(None if self.mask is None else self.mask.to(device, **options))
        copy._runs = self._runs
        return copy


def mask_of_call(mask: Any, module: nn.Module, run: object | None) -> Any:
    """Return what an attention module may use of the mask that it was given.

    Args:
        mask: From ``key_mask``, or what came in its place.
        module: The attention module.
        run: What stands for the run that holds it, None if none does.

    Returns:
        A `CallMask` of plain causal attention; else the tensor ``[B, 1, Q, K]`` or None. Tensors
        with 4 dimensions are the user's own, or made for a dense model: they say everything.

    Raises:
        ValueError: The call has run other layers in another run, or without one.
    """
    # A module without a run is of no kind that runs hold (cross-attention), or its run was closed.
    held = run is not None or compat.is_self_attention(module)
    if isinstance(mask, CallMask):
        if held:
            mask.claim(run)
        return mask.mask if isinstance(mask, OwnMask) else mask
    if held and not (isinstance(mask, Tensor) and mask.ndim == 4):
        raise ValueError(
            f"layer {module.layer_idx} got a mask that dynmask did not make: accelerate() was "
            "opened while this call was inside the model (by another thread or a hook), or the "
            "layer was called by itself; call the whole model, and open a run while none is inside"
        )
    return mask
