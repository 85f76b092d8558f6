"""The cache of an accelerated run: decode steps that look at few keys, and heads that forget."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynmask.dam.paged import PagedKeys
from dynmask.dam.static_keys import StaticKeys, outlasts_inference_mode
from dynmask.hf.dynamic import HeadStripes, Split
from dynmask.hf.keys import KeySlots
from dynmask.hf.leased import Lease, LeasedLayer, as_kept
from dynmask.hf.tally import kind_of
from dynmask.ops import attention
from dynmask.ops.attention import resolve

if TYPE_CHECKING:
    from dynmask.hf.attention import Attached

_SHORT = 64  # Rows of a call that looks at keys where they are; longer ones run as a prefill.


class RunLayer(LeasedLayer):
    """One layer of a run's cache: the heads on stripes apart from the others.

    Kv heads whose query heads all run on the plan's stripes give up the keys that no later row
    sees (`StaticKeys`). The others keep every key; a single row looks at the blocks that it
    chooses, where the run's masks are dynamic (`PagedKeys`).

    Args:
        attached: What the run hangs on the layer's attention module.
        lease: Of the run that makes the cache.
    """

    _split: Split
    _groups: tuple[Tensor, Tensor]  # Numbers of the kv heads that are paged, and of the others.

    def __init__(self, attached: Attached, lease: Lease):
        self._attached = attached
        super().__init__(lease)

    def _forget(self) -> None:
        super()._forget()
        self._new: tuple[Tensor, Tensor] | None = None
        self._paged: PagedKeys | None = None
        self._static: StaticKeys | None = None
        self._mixed: HeadStripes | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in new tokens; return them, marked for `dynmask_attention`.

        Raises:
            ValueError: As `begin`, or gradients are on.
        """
        if key_states.requires_grad or value_states.requires_grad:
            raise ValueError("run.cache() keeps no gradients: call the model under torch.no_grad()")
        key_states, value_states = as_kept(key_states, value_states)
        self.begin(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._new = key_states, value_states
        return self.marked(key_states, value_states)

    @outlasts_inference_mode
    def __deepcopy__(self, memo: dict[int, Any]) -> RunLayer:
        # What belongs to the run is shared, and would refuse to be copied.
        for shared in (self._attached, self._mixed, getattr(self, "_split", None)):
            memo[id(shared)] = shared
        copied = object.__new__(RunLayer)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(vars(self), memo))
        return copied

    def runs(self, rows: int) -> bool:
        """Say whether a call is a short one behind a prompt."""
        dynamic = self._attached.dynamic
        most = _SHORT if dynamic is None else min(_SHORT, max(dynamic.settings.few, 1))
        return rows <= most and rows < self._seen

    def attend(
        self, query: Tensor, slots: KeySlots, *, scale: float | None, impl: str
    ) -> tuple[Tensor, str]:
        """Attend in a short call behind a prompt; see `LeasedLayer.attend`."""
        self._absorb(slots)
        if self._static is None:
            return self._attend_paged(query, slots, scale, impl)
        if self._paged is None:
            return self._static.attend(query, scale=scale), "evicted"
        paged, rest = self._split.heads(query.device)
        out = torch.empty_like(query)
        out[:, paged], name = self._attend_paged(query[:, paged], slots, scale, impl)
        out[:, rest] = self._static.attend(query[:, rest], scale=scale)
        return out, f"{name}, static evicted"

    def _attend_paged(
        self, query: Tensor, slots: KeySlots, scale: float | None, impl: str
    ) -> tuple[Tensor, str]:
        assert self._paged is not None
        if self._mixed is not None:
            mask = self._mixed.on(query.device)
            mask = mask if slots.padding is None else mask & slots.padding
            k, v = self._paged.keys, self._paged.values
            impl = resolve(impl, query, k, v, mask)
            return attention(query, k, v, mask, scale=scale, impl=impl), impl
        real = None if slots.whole else slots.visible
        tally, kind = self._attached.tally, kind_of(query.shape[2], slots.length)
        clock = tally.clock(query.device)
        step = self._paged.attend(query, real, scale=scale, impl=impl, clock=clock)
        if step.shown is None:
            if kind == "chunk":  # As over an ordinary cache, where steps are not counted.
                tally.add_pairs(kind, causal=step.causal, shown=step.causal, computed=step.causal)
            return step.out, step.impl
        # Dense kernels evaluate every pair, whatever the mask shows.
        computed = step.shown if step.impl in ("cpu", "triton") else step.causal
        tally.add_pairs(kind, causal=step.causal, shown=step.shown, computed=computed)
        return step.out, f"paged {step.impl}"

    def whole(self, slots: KeySlots) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[B, G, K, D]`` of all tokens; what was given up is zeros."""
        assert self._new is not None
        if self._seen == self._new[0].shape[2]:
            return self._new
        self._absorb(slots)
        if self._static is None:
            assert self._paged is not None
            return self._paged.keys, self._paged.values
        if self._paged is None:
            return self._static.expanded()
        paged, rest = self._groups
        found = []
        for own, other in zip(
            (self._paged.keys, self._paged.values), self._static.expanded(), strict=True
        ):
            both = own.new_empty(len(own), len(paged) + len(rest), *own.shape[2:])
            both[:, paged], both[:, rest] = own, other
            found.append(both)
        return found[0], found[1]

    def settle(self, query: Tensor, slots: KeySlots, *, scale: float | None) -> None:
        """Store the tokens of a call, and give up what no later row sees."""
        self._absorb(slots)
        if self._static is not None:
            self._static.evict()
        self._settled = True

    def _absorb(self, slots: KeySlots) -> None:
        """Store the tokens of this call, once."""
        if self._new is None:
            return
        keys, values = self._new
        if self._paged is None and self._static is None:
            self._divide(keys.shape[1], keys.device)
        if self._static is None:
            assert self._paged is not None
            self._paged.append(keys, values)
        else:
            paged, rest = self._groups
            real = None if slots.whole else slots.host[:, -keys.shape[2] :]
            self._static.append(keys[:, rest], values[:, rest], real)
            if self._paged is not None:
                self._paged.append(keys[:, paged], values[:, paged])
        self._new = None

    def _divide(self, groups: int, device: torch.device) -> None:
        """Say which heads are kept how."""
        attached = self._attached
        assert attached.stripes is not None
        dynamic = attached.dynamic
        stripes = attached.stripes
        self._split = Split(stripes, groups) if dynamic is None else dynamic.split(groups)
        paged, rest = self._split.heads(device)
        ratio = stripes.heads // groups
        self._groups = paged[::ratio] // ratio, rest[::ratio] // ratio
        if len(rest):
            assert self._split.static is not None
            # The run's one copy on this device: what is derived from it is kept with it.
            self._static = StaticKeys(self._split.static.on(device), len(self._groups[1]))
        if len(paged):
            self._paged = PagedKeys(None if dynamic is None else dynamic.settings)
            of_paged = stripes.of_heads(paged.tolist())
            if dynamic is None and not bool(of_paged.full_heads.all()):
                self._mixed = HeadStripes(of_paged)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(store.nbytes for store in self._stores)

    @property
    def _stores(self) -> list[PagedKeys | StaticKeys]:
        return [store for store in (self._paged, self._static) if store is not None]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: any number, or up to 64 where heads gave keys up.

        Raises:
            ValueError: Keys that are needed again were given up.
        """
        remove = self.removed(tokens_to_remove)
        self.check_crop(tokens_to_remove)
        for store in self._stores:
            store.crop(remove)
        self._seen -= remove

    def check_crop(self, tokens_to_remove: int) -> None:
        """Change nothing; raise what `crop` would."""
        if self._static is not None:
            self._static.check_crop(self.removed(tokens_to_remove))

    def select(self, indices: Tensor) -> None:
        """Take some batch rows."""
        for store in self._stores:
            store.select(indices)
