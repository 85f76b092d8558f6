"""A cache with a hard cap: the tokens that are looked at stay, the others are given up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from transformers.cache_utils import DynamicLayer

from dynmask.dam.evict import RECENT, SINKS, importance, kept, last_real
from dynmask.hf.keys import KeySlots
from dynmask.hf.leased import Lease, LeasedLayer, as_kept, nbytes
from dynmask.masks import Lifetimes
from dynmask.masks.lifetimes import NEVER
from dynmask.ops import attention
from dynmask.ops.attention import resolve

_ROOM = 128  # Slots that evicting frees at most: it is not worth doing for every token.
SMALLEST = 2 * (SINKS + RECENT)


class CappedLayer(LeasedLayer):
    """One layer of a capped cache: an ordinary one until its tokens exceed the cap.

    Then, and whenever the slots are full again, the tokens that the last rows hardly look at with
    any head are given up, in all heads; see `dynmask.dam.evict`. Rows of a call still see all slots
    and each other; only what is kept after the call is bounded.

    Args:
        cap: Slots, the same tokens in every kv head.
        lease: Of the run that makes the cache.

    Attributes:
        evicted: Whether keys were given up: slots are no longer tokens.
    """

    def __init__(self, cap: int, lease: Lease):
        self.cap = cap
        super().__init__(lease)

    def _forget(self) -> None:
        super()._forget()
        self.evicted = False
        self._held: Tensor | None = None  # [B, S], the filled ones of the slots that stayed.
        self._queries: Tensor | None = None
        self._real: Tensor | None = None
        self._tokens: Tensor | None = None  # [B, N], the real ones of all tokens.
        self._scale = 1.0
        self._whole = True
        self._since = 0  # Tokens since keys were given up last.

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in new tokens; return what the rows of this call see, for `dynmask_attention`.

        Raises:
            ValueError: As `begin`.
        """
        key_states, value_states = as_kept(key_states, value_states)
        self.begin(key_states)
        new = key_states.shape[2]
        # Before a short call rather than after it, so that the call's tokens can be cropped again.
        if self._queries is not None and new <= RECENT and self.keys.shape[2] + new > self.cap:
            self._evict()
        self._since += new
        keys, values = DynamicLayer.update(self, key_states, value_states)
        return self.marked(keys, values)

    def runs(self, rows: int) -> bool:
        """Say whether slots are no longer tokens."""
        return self.evicted

    def whole(self, slots: KeySlots) -> tuple[Tensor, Tensor]:
        """Return what is held."""
        return self.keys, self.values

    def attend(
        self, query: Tensor, slots: KeySlots, *, scale: float | None, impl: str
    ) -> tuple[Tensor, str]:
        """Attend to the kept keys and to the tokens of this call; see `LeasedLayer.attend`."""
        self._tokens = slots.visible
        mask = None
        if not slots.whole:
            expiry = torch.where(self._filled(), NEVER, 0).int()[:, None]
            mask = Lifetimes._trusted(expiry, expiry.shape[2])
        impl = resolve(impl, query, self.keys, self.values, mask)
        out = attention(query, self.keys, self.values, mask, scale=scale, impl=impl)
        return out, f"capped {impl}"

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
            self.keys, self.values = _taken(self.keys, order), _taken(self.values, order)
        score = importance(
            self._queries, self.keys, rows=self._real, slots=filled, scale=self._scale
        )
        if self._lease.group is not None:  # All keep what the heads of any process look at.
            distributed.all_reduce(score, distributed.ReduceOp.MAX, self._lease.group)
        stay = kept(score, self.cap - min(_ROOM, self.cap // 8))
        self.keys, self.values = _taken(self.keys, stay), _taken(self.values, stay)
        # Empty slots stay last, so a row's filled slots are its last ones.
        self._held = filled[:, -stay.shape[1] :]
        self.evicted = True
        self._since = 0

    def _filled(self) -> Tensor:
        """Return ``[B, S]`` bool, which slots hold a token; those since evicting may be padding."""
        assert self._tokens is not None
        held = 0 if self._held is None else self._held.shape[1]
        new = self.keys.shape[2] - held
        real = self._tokens[:, self._tokens.shape[1] - new :]
        return real if self._held is None else torch.cat([self._held, real], 1)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as long as no key was given up since.

        Raises:
            ValueError: Keys were given up since.
        """
        remove = self.removed(tokens_to_remove)
        if remove == 0:
            return
        self.check_crop(tokens_to_remove)
        super().crop(-remove)
        if self._queries is not None and self._real is not None:
            left = max(self._queries.shape[2] - remove, 0)
            self._queries, self._real = self._queries[:, :, :left], self._real[:, :left]
        if self._tokens is not None:
            self._tokens = self._tokens[:, : self._seen - remove]
        self._seen -= remove
        self._since -= remove

    def check_crop(self, tokens_to_remove: int) -> None:
        """Change nothing; raise what `crop` would."""
        remove = self.removed(tokens_to_remove)
        if self.evicted and remove > self._since:
            raise ValueError(
                f"the last {remove} tokens cannot be removed: the cache gave up keys "
                f"{self._since} tokens ago; take a larger max_cache_tokens than {self.cap}"
            )

    def select(self, indices: Tensor) -> None:
        """Take some batch rows."""
        for name in ("keys", "values", "_held", "_queries", "_real", "_tokens"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor[indices.to(tensor.device)])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return nbytes(vars(self).values())


def _taken(source: Tensor, order: Tensor) -> Tensor:
    """Return ``[B, G, n, D]``, the rows of ``source`` at ``order [B, n]``."""
    index = order[:, None, :, None].expand(-1, source.shape[1], -1, source.shape[3])
    return source.gather(2, index)
