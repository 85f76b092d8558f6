"""A cache with a hard cap: the keys that are looked at stay, the others are given up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from dynmask.dam.evict import RECENT, SINKS, importance, kept, last_real
from dynmask.hf.keys import KeySlots
from dynmask.masks import Lifetimes
from dynmask.masks.lifetimes import NEVER
from dynmask.ops import attention, choose

_LAYER = "_dynmask_capped"
_ROOM = 128  # Slots that evicting frees at most: it is not worth doing for every token.
SMALLEST = 2 * (SINKS + RECENT)


class Lease:
    """Says whether a run still holds its model; copies of a cache share it."""

    def __init__(self) -> None:
        self.open = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Lease:
        return self


class CappedLayer(DynamicLayer):
    """One layer of a capped cache: an ordinary one until its tokens exceed the cap.

    Then, and whenever the slots are full again, the keys that the last rows hardly look at are
    given up, see `dynmask.dam.evict`. Rows of a call still see all slots and each other; only what
    is kept after the call is bounded.

    Args:
        cap: Slots for each kv head.
        lease: Of the run that makes the cache.

    Attributes:
        evicted: Whether keys were given up: slots are no longer tokens.
    """

    is_croppable = True
    keys: Any
    values: Any

    def __init__(self, cap: int, lease: Lease):
        super().__init__()
        self.cap = cap
        self._lease = lease
        self._forget()

    def _forget(self) -> None:
        self.evicted = False
        self._held: Tensor | None = None  # [B, S], the filled ones of the slots that stayed.
        self._queries: Tensor | None = None
        self._real: Tensor | None = None
        self._tokens: Tensor | None = None  # [B, N], the real ones of all tokens.
        self._scale = 1.0
        self._whole = True
        self._seen = 0
        self._since = 0  # Tokens since keys were given up last.
        self._settled = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in new tokens; return what the rows of this call see, for `dynmask_attention`.

        Raises:
            ValueError: The call is not one of the run that made the cache, or the one before it
                was cut off.
        """
        if not self._lease.open or not self._settled:
            raise ValueError(
                "this capped cache is for the model inside accelerate() that made it, or its last "
                "call was cut off (out of memory, interrupted): run that model inside the with "
                "block, and make a new cache with run.cache() for each run and after an error"
            )
        new = key_states.shape[2]
        # Before a short call rather than after it, so that the call's tokens can be cropped again.
        if self._queries is not None and new <= RECENT and self.keys.shape[2] + new > self.cap:
            self._evict()
        keys, values = super().update(key_states, value_states)
        self._seen += new
        self._since += new
        self._settled = False
        # A new tensor object: the mark must not make a cycle with what the layer holds.
        keys = keys.view_as(keys)
        setattr(keys, _LAYER, self)
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
                f"a layer of this capped cache has seen {self._seen} tokens of {slots.length}: an "
                "earlier call was cut off (out of memory, interrupted); make a new cache with "
                "run.cache() and give it the whole prompt again"
            )

    def attend(
        self, query: Tensor, slots: KeySlots, *, scale: float | None, impl: str
    ) -> tuple[Tensor, str]:
        """Attend to the kept keys and to the tokens of this call.

        Args:
            query: ``[B, H, Q, D]``.
            slots: Of all tokens so far.
            scale: Factor of the logits.
            impl: "auto" or a backend.

        Returns:
            ``[B, H, Q, D]``, and what ran it.
        """
        self._tokens = slots.visible
        mask = None
        if not slots.whole:
            expiry = torch.where(self._filled(), NEVER, 0).int()[:, None]
            mask = Lifetimes._trusted(expiry, expiry.shape[2])
        if impl == "auto":
            impl = choose(query, self.keys, self.values, mask)
        return attention(query, self.keys, self.values, mask, scale=scale, impl=impl), impl

    def settle(self, query: Tensor, slots: KeySlots, *, scale: float | None) -> None:
        """End a call: remember its last queries, and give keys up if there are too many.

        Args:
            query: ``[B, H, Q, D]``, of the call.
            slots: As in `attend`.
            scale: As in `attend`.
        """
        real = slots.visible[:, -query.shape[2] :]
        if self._queries is not None and self._real is not None and query.shape[2] < RECENT:
            query = torch.cat([self._queries, query], 2)
            real = torch.cat([self._real, real], 1)
        # A copy: a view would hold the whole prompt's queries.
        self._queries, self._real = last_real(query, real, RECENT)
        self._scale = query.shape[3] ** -0.5 if scale is None else scale
        self._tokens, self._whole = slots.visible, slots.whole
        if self.keys.shape[2] > self.cap:
            self._evict()
        self._settled = True

    def _evict(self) -> None:
        assert self._queries is not None
        assert self._real is not None
        filled = self._filled()
        if not self._whole:  # Empty slots first, so that the last rows own the last slots.
            order = filled.sort(dim=-1, stable=True).indices
            filled = filled.gather(1, order)
            order = order[:, None].expand(-1, self.keys.shape[1], -1)
            self.keys, self.values = _taken(self.keys, order), _taken(self.values, order)
        score = importance(
            self._queries, self.keys, rows=self._real, slots=filled, scale=self._scale
        )
        stay = kept(score, self.cap - min(_ROOM, self.cap // 8))
        self.keys, self.values = _taken(self.keys, stay), _taken(self.values, stay)
        # Empty slots stay last, so a row's filled slots are its last ones, in every head.
        self._held = filled[:, -stay.shape[2] :]
        self.evicted = True
        self._since = 0

    def _filled(self) -> Tensor:
        """Return ``[B, S]`` bool, which slots hold a token; those since evicting may be padding."""
        assert self._tokens is not None
        held = 0 if self._held is None else self._held.shape[1]
        new = self.keys.shape[2] - held
        real = self._tokens[:, self._tokens.shape[1] - new :]
        return real if self._held is None else torch.cat([self._held, real], 1)

    def get_seq_length(self) -> int:
        """Return the tokens seen, padding and evicted ones included."""
        return self._seen

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as long as no key was given up since.

        Raises:
            ValueError: Keys were given up since.
        """
        length = tokens_to_remove if tokens_to_remove > 0 else self._seen + tokens_to_remove
        remove = self._seen - length
        if remove <= 0:
            return
        if self.evicted and remove > self._since:
            raise ValueError(
                f"the last {remove} tokens cannot be removed: the cache gave up keys "
                f"{self._since} tokens ago; take a larger max_cache_tokens than {self.cap}"
            )
        super().crop(-remove)
        if self._queries is not None and self._real is not None:
            left = max(self._queries.shape[2] - remove, 0)
            self._queries, self._real = self._queries[:, :, :left], self._real[:, :left]
        if self._tokens is not None:
            self._tokens = self._tokens[:, :length]
        self._seen -= remove
        self._since -= remove

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
        self._each(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows."""
        self._each(lambda t: t[indices.to(t.device)])

    def _each(self, function: Callable[[Tensor], Tensor]) -> None:
        if not self._seen:
            return
        for name in ("keys", "values", "_held", "_queries", "_real", "_tokens"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, function(tensor))


class CappedCache(DynamicCache):
    """The cache of ``run.cache(max_cache_tokens)``; layers with a window of their own keep theirs.

    Args:
        config: Of the model.
        cap: Slots for each kv head.
        lease: Of the run that makes the cache.
    """

    def __init__(self, config: Any, cap: int, lease: Lease):
        super().__init__(config=config)
        self.layers = [
            CappedLayer(cap, lease) if type(layer) is DynamicLayer else layer
            for layer in self.layers
        ]

    def memory(self) -> int:
        """Return the bytes held by all layers."""
        total = 0
        for layer in self.layers:
            total += _bytes(vars(layer).values())
        return total


def _bytes(values: Iterable[object]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def capped_layer(key: Tensor) -> CappedLayer | None:
    """Return the capped layer that gave these keys, if one did."""
    layer = getattr(key, _LAYER, None)
    return layer if isinstance(layer, CappedLayer) else None


def _taken(source: Tensor, order: Tensor) -> Tensor:
    """Return ``[B, G, n, D]``, the rows of ``source`` at ``order [B, G, n]``."""
    return source.gather(2, order[..., None].expand(-1, -1, -1, source.shape[3]))
