"""Keys and values of heads whose decode steps look at few blocks of keys."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from dynmask.dam.dynamic import Dynamic
from dynmask.dam.kernels import by_kernels
from dynmask.dam.paged_select import Pages, select
from dynmask.dam.quantized import Quantized
from dynmask.dam.static_keys import outlasts_inference_mode
from dynmask.masks import Lifetimes
from dynmask.masks.lifetimes import NEVER
from dynmask.ops import attention, choose, supports
from dynmask.ops.attention import resolve
from dynmask.ops.reference import accumulation_dtype

# Room for new tokens when the old is used up, as a part of the tokens there are.
_PART = 16
_LEAST = 256
# Numbers that are quantized at once, in float32.
_CELLS = 1 << 24


class Step(NamedTuple):
    """What a decode step did, in (query, key) pairs of all heads; a summary is one key.

    Attributes:
        out: ``[B, H, Q, D]``.
        causal: Pairs of plain causal attention.
        shown: Pairs that the choice shows, ``[]`` int64; None if nothing was chosen.
        impl: The backend that ran.
    """

    out: Tensor
    causal: int
    shown: Tensor | None
    impl: str


class PagedKeys:
    """The keys and values of some kv heads, with a summary of every block in front.

    Slot ``J`` of the buffers holds the means of block ``J``'s keys and values, slot ``room / block
    + j`` key ``j``. Tokens are written in place; the buffers grow by a sixteenth at a time.

    A single row looks at what is nearer than ``settings.near`` tokens key by key, and at each older
    block key by key or as its summary: blocks are chosen as in a prefill (`Dynamic`), from the
    logits of all their keys. On a GPU these are the logits of keys in 4 bits, kept beside the
    others, so that a step reads a sixth of the cache and the chosen blocks; elsewhere exact ones.

    Args:
        settings: How blocks are chosen; None: every row sees every key.
        quantized: Whether keys are kept in 4 bits too; by default on a GPU.

    Attributes:
        tokens: How many are held.
    """

    def __init__(self, settings: Dynamic | None, *, quantized: bool | None = None):
        self.settings = settings
        self.tokens = 0
        self._quantized = quantized
        self._room = 0
        self._pages = 0  # Blocks whose summaries and codes are there.
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self._bias: Tensor | None = None  # [slots]
        self._codes: Quantized | None = None

    @property
    def keys(self) -> Tensor:
        """Return a view ``[B, G, tokens, D]``."""
        assert self._k is not None
        return self._tokens_of(self._k)

    @property
    def values(self) -> Tensor:
        """Return a view ``[B, G, tokens, D]``."""
        assert self._v is not None
        return self._tokens_of(self._v)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self._tensors())

    @outlasts_inference_mode
    def append(self, k: Tensor, v: Tensor) -> None:
        """Take in new tokens.

        Args:
            k: ``[B, G, n, D]``.
            v: ``[B, G, n, D]``.
        """
        k, v = k.detach(), v.detach()
        stop = self.tokens + k.shape[2]
        if self._k is None or stop > self._room:
            self._grow(k, stop)
        assert self._k is not None
        assert self._v is not None
        front = self._front
        self._k[:, :, front + self.tokens : front + stop] = k
        self._v[:, :, front + self.tokens : front + stop] = v
        self.tokens = stop
        if self.settings is not None:
            self._summarise()

    def attend(
        self,
        q: Tensor,
        real: Tensor | None = None,
        *,
        scale: float | None = None,
        impl: str = "auto",
        clock: AbstractContextManager[object] | None = None,
    ) -> Step:
        """Attend from the last tokens: a single row to what it chooses, several to every key.

        Args:
            q: ``[B, H, Q, D]``, the queries of the last ``Q`` tokens.
            real: ``[B, tokens]`` bool, which tokens are no padding; None for all.
            scale: Factor of the logits; ``D ** -0.5`` by default.
            impl: "auto" or a backend of `dynmask.ops.attention`.
            clock: Entered around the choice.

        Returns:
            The rows' outputs, and what was done.
        """
        assert self._k is not None
        assert self._v is not None
        batch, heads, q_len, dim = q.shape
        scale = dim**-0.5 if scale is None else scale
        causal = batch * heads * (q_len * self.tokens - q_len * (q_len - 1) // 2)
        far = self._far()
        if self.settings is None or q_len > 1 or far == 0:
            mask = (
                None
                if real is None
                else Lifetimes._trusted(torch.where(real, NEVER, 0).int()[:, None], None)
            )
            impl = resolve(impl, q, self.keys, self.values, mask)
            out = attention(q, self.keys, self.values, mask, scale=scale, impl=impl)
            return Step(out, causal, None, impl)
        with nullcontext() if clock is None else clock, torch.no_grad():
            rows = q.reshape(batch, self._k.shape[1], -1, dim)
            expiry, seen = select(rows, self._pages_of(far), self.settings, real, scale)
            mask = Lifetimes._trusted(expiry, None)
            assert self._bias is not None
            bias = self._bias[: expiry.shape[2]].expand(expiry.shape)
            shown = seen * (heads // self._k.shape[1])
        end = self._front + self.tokens
        k, v = self._k[:, :, :end], self._v[:, :, :end]
        if impl == "auto":
            # Which keys are seen is known: gathering them beats a dense kernel under a mask.
            gathers = supports("cpu", q, k, v, mask, bias=bias) is None
            impl = "cpu" if gathers else choose(q, k, v, mask, bias=bias)
        return Step(
            attention(q, k, v, mask, bias=bias, scale=scale, impl=impl), causal, shown, impl
        )

    def crop(self, count: int) -> None:
        """Forget the last ``count`` tokens."""
        self.tokens -= count
        if self.settings is not None:
            self._pages = min(self._pages, self.tokens // self.settings.block)

    @outlasts_inference_mode
    def select(self, indices: Tensor) -> None:
        """Take the batch rows ``indices [n]``, as beam search does."""
        if self._k is None or self._v is None:
            return
        index = indices.to(self._k.device)
        self._k, self._v = self._k[index], self._v[index]
        if self._codes is not None:
            self._codes = self._codes.each(lambda t: t[index])

    @property
    def _front(self) -> int:
        """Slots before the first key."""
        return 0 if self.settings is None else self._room // self.settings.block

    def _tokens_of(self, buffer: Tensor) -> Tensor:
        return buffer[:, :, self._front : self._front + self.tokens]

    def _tensors(self) -> list[Tensor]:
        codes = self._codes
        of_codes = [] if codes is None else [codes.codes, codes.low, codes.step]
        return [t for t in (self._k, self._v, self._bias, *of_codes) if t is not None]

    def _grow(self, like: Tensor, stop: int) -> None:
        """Make room for ``stop`` tokens and some more."""
        block = 1 if self.settings is None else self.settings.block
        room = stop + max(_LEAST, stop // _PART)
        room = -(-room // block) * block
        front = 0 if self.settings is None else room // block
        old = self._k, self._v, self._front
        new = []
        for buffer in old[:2]:
            # Zeros, for slots that no row sees are still multiplied.
            grown = like.new_zeros(*like.shape[:2], front + room, like.shape[3])
            if buffer is not None:
                grown[:, :, : self._pages] = buffer[:, :, : self._pages]
                grown[:, :, front : front + self.tokens] = self._tokens_of(buffer)
            new.append(grown)
        if self._codes is not None:
            extra = front - self._codes.codes.shape[2]
            self._codes = self._codes.each(lambda t: _padded(t, extra))
        self._k, self._v = new
        self._room = room
        if self.settings is not None:
            wide = accumulation_dtype(like.dtype)
            self._bias = torch.zeros(front + room, dtype=wide, device=like.device)
            self._bias[:front] = math.log(block)

    def _summarise(self) -> None:
        """Make what is missing for whole blocks."""
        assert self.settings is not None
        assert self._k is not None
        block, (batch, groups, _, dim) = self.settings.block, self._k.shape
        pages = self.tokens // block
        most = max(1, _CELLS // (batch * groups * block * dim))
        for begin in range(self._pages, pages, most):
            self._summarise_blocks(slice(begin, min(begin + most, pages)), block)
        self._pages = pages

    def _summarise_blocks(self, new: slice, block: int) -> None:
        assert self._k is not None
        assert self._v is not None
        tokens = slice(new.start * block, new.stop * block)
        of_keys = self.keys[:, :, tokens].unflatten(2, (-1, block))
        self._k[:, :, new] = of_keys.mean(3)
        self._v[:, :, new] = self.values[:, :, tokens].unflatten(2, (-1, block)).mean(3)
        if not self._keeps_codes():
            return
        found = Quantized.of(of_keys)
        if self._codes is None:
            self._codes = found.each(lambda t: _padded(t[:, :, :0], self._front))
        for field in fields(found):
            held: Tensor = getattr(self._codes, field.name)
            held[:, :, new] = getattr(found, field.name)

    def _keeps_codes(self) -> bool:
        assert self._k is not None
        assert self.settings is not None
        if self._quantized is None:
            dim = self._k.shape[3]
            run = by_kernels(self._k, "quantized_stats", cells=self.settings.block * dim)
            return dim % 2 == 0 and run is not None
        return self._quantized

    def _far(self) -> int:
        """Return how many blocks end ``near`` keys before the last token."""
        settings = self.settings
        if settings is None or self.tokens < max(settings.shortest, 1):
            return 0
        return max(0, self.tokens - 1 - settings.near) // settings.block

    def _pages_of(self, far: int) -> Pages:
        assert self._k is not None
        assert self.settings is not None
        means = self._k[:, :, :far]
        return Pages(self.keys, means, self._codes, self.settings.block, self._front)


def _padded(tensor: Tensor, extra: int) -> Tensor:
    """Return ``tensor`` with so many slots more in its third dimension."""
    shape = *tensor.shape[:2], extra, *tensor.shape[3:]
    return torch.cat([tensor, tensor.new_zeros(shape)], 2)
