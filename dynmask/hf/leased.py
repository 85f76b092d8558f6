"""What the layers of a run's own caches have in common."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache, DynamicLayer

from dynmask.hf import compat
from dynmask.hf.keys import KeySlots

_LAYER = "_dynmask_cache_layer"

_GIVEN = threading.local()
"""``layer``: the one whose `update` a module has called in this thread, until it attends."""


class Lease:
    """Says whether a run still holds its model, and who calls; copies of a cache share it.

    Args:
        group: The processes that the model's heads are split over; None if each has all of them.
    """

    def __init__(self, group: Any = None) -> None:
        self.open = True
        self.group = group
        self._of_thread = threading.local()
        self._watching: list[RemovableHandle] = []

    @property
    def inside(self) -> bool:
        """Whether this thread is inside one of the watched modules."""
        return getattr(self._of_thread, "inside", False)

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """Take note of calls of these attention modules; only the first time."""
        if not self._watching:
            for module in modules:
                self._watching += [
                    module.register_forward_pre_hook(self._enter),
                    module.register_forward_hook(self._leave, always_call=True),
                ]

    def end(self) -> None:
        """Refuse all further calls."""
        self.open = False
        for handle in self._watching:
            handle.remove()

    @torch.compiler.disable
    def _enter(self, *_: Any) -> None:
        self._of_thread.inside, _GIVEN.layer = True, None

    @torch.compiler.disable
    def _leave(self, *_: Any) -> None:
        self._of_thread.inside, _GIVEN.layer = False, None

    def __deepcopy__(self, memo: dict[int, Any]) -> Lease:
        return self


class LeasedLayer(DynamicLayer):
    """A layer that takes part in attention: `dynmask_attention` finds it by the keys it gave.

    A call goes ``update``, then ``attend`` if ``runs`` says so or else attention over ``whole``,
    then ``settle``.

    Args:
        lease: Of the run that makes the cache.
    """

    is_croppable = True
    keys: Any
    values: Any

    def __init__(self, lease: Lease):
        super().__init__()
        self._lease = lease
        self._forget()

    def _forget(self) -> None:
        self._seen = 0
        self._batch = 0
        self._settled = True

    def begin(self, key_states: Tensor) -> None:
        """Count the tokens of a new call.

        What is kept follows from the masks of the run that made the cache.

        Raises:
            ValueError: The call is not one of that run's model, and nothing is changed; or the one
                before it was cut off.
        """
        if not (self._lease.open and self._lease.inside):
            raise ValueError(
                "this cache is for the model inside accelerate() that made it: run that model "
                "inside the with block, and make a new cache with run.cache() for each run"
            )
        if not self._settled:
            raise ValueError(
                "the last call with this cache was cut off (out of memory, interrupted): make a "
                "new cache with run.cache() and give it the whole prompt again"
            )
        self._batch = len(key_states)
        self._seen += key_states.shape[2]
        self._settled = False
        _GIVEN.layer = self

    def marked(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values that `leased_layer` knows."""
        # New tensor objects: the mark must not make a cycle with what the layer holds.
        keys, values = keys.view_as(keys), values.view_as(values)
        setattr(keys, _LAYER, self)
        setattr(values, _LAYER, self)
        return keys, values

    def check(self, slots: KeySlots) -> None:
        """Refuse to go on where layers have seen different tokens.

        Args:
            slots: Of all tokens so far, as the first layer counts them.

        Raises:
            ValueError: An earlier call was cut off.
        """
        if self._seen != slots.length:
            raise ValueError(
                f"a layer of this cache has seen {self._seen} tokens of {slots.length}: an earlier "
                "call was cut off (out of memory, interrupted); make a new cache with run.cache() "
                "and give it the whole prompt again"
            )

    @abstractmethod
    def runs(self, rows: int) -> bool:
        """Say whether `attend` runs a call of so many rows."""

    @abstractmethod
    def whole(self, slots: KeySlots) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[B, G, K, D]`` for a call that `attend` does not run."""

    @abstractmethod
    def attend(
        self, query: Tensor, slots: KeySlots, *, scale: float | None, impl: str
    ) -> tuple[Tensor, str]:
        """Attend to what is held, the tokens of this call included.

        Args:
            query: ``[B, H, Q, D]``.
            slots: Of all tokens so far.
            scale: Factor of the logits.
            impl: "auto" or a backend.

        Returns:
            ``[B, H, Q, D]``, and what ran it.
        """

    @abstractmethod
    def settle(self, query: Tensor, slots: KeySlots, *, scale: float | None) -> None:
        """End a call: store its tokens, and give up what is not kept.

        Args:
            query: ``[B, H, Q, D]``, of the call.
            slots: As in `attend`.
            scale: As in `attend`.
        """

    @abstractmethod
    def select(self, indices: Tensor) -> None:
        """Take the batch rows ``indices [n]``, some of them or some more than once."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""

    def get_seq_length(self) -> int:
        """Return the tokens seen, padding and evicted ones included."""
        return self._seen

    def removed(self, tokens_to_remove: int) -> int:
        """Return how many tokens ``crop`` is asked to remove, from either of its two forms."""
        length = tokens_to_remove if tokens_to_remove > 0 else self._seen + tokens_to_remove
        return max(self._seen - max(length, 0), 0)

    @abstractmethod
    def check_crop(self, tokens_to_remove: int) -> None:
        """Change nothing.

        Raises:
            ValueError: `crop` would refuse.
        """

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = None
        self.is_initialized = False
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take batch rows in another order, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row."""
        self.batch_select_indices(torch.arange(self._batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows at ``indices``, integers or bool ``[B]``."""
        if self._seen:
            indices = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
            self.select(indices)
            self._batch = len(indices)


class LeasedCache(DynamicCache):
    """A cache of such layers; those that a run leaves alone keep transformers' own.

    Args:
        config: Of the model.
        make: Makes the layer at an index; None to leave it alone.
    """

    def __init__(self, config: Any, make: Callable[[int], LeasedLayer | None]):
        super().__init__(config=config)
        self.layers = [
            (make(index) if type(layer) is DynamicLayer else None) or layer
            for index, layer in enumerate(self.layers)
        ]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens from every layer, or from none.

        Raises:
            ValueError: A layer cannot.
        """
        ours = [layer for layer in self.layers if isinstance(layer, LeasedLayer)]
        for layer in ours:
            layer.check_crop(tokens_to_remove)
        # Those of transformers may refuse too, and all for the same reason: they come first.
        for other in self.layers:
            if not isinstance(other, LeasedLayer):
                other.crop(tokens_to_remove)  # type: ignore[union-attr]
        for layer in ours:
            layer.crop(tokens_to_remove)

    def memory(self) -> int:
        """Return the bytes held by all layers."""
        return sum(
            layer.nbytes if isinstance(layer, LeasedLayer) else nbytes(vars(layer).values())
            for layer in self.layers
        )


def as_kept(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values in the dtype that `dynmask_attention` runs in."""
    dtype = compat.autocast_dtype(keys)
    return (keys, values) if dtype is None else (keys.to(dtype), values.to(dtype))


def nbytes(values: Iterable[object]) -> int:
    """Add up the bytes of the tensors among ``values``."""
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def leased_layer(key: Tensor, value: Tensor) -> LeasedLayer | None:
    """Return the layer of a run's cache that gave these keys and values, if one did.

    Raises:
        ValueError: They are not what it gave, or it is the second time that they are attended to.
    """
    layer: LeasedLayer | None = getattr(key, _LAYER, None)
    given: LeasedLayer | None = getattr(_GIVEN, "layer", None)
    _GIVEN.layer = None
    if layer is not given or layer is not getattr(value, _LAYER, None):
        raise ValueError(
            "this model changes keys or values between its cache and its attention, or attends "
            "more than once (latent attention, DiffLlama): caches of run.cache() cannot serve it; "
            "leave them out, and generate() makes its own"
        )
    return layer
