"""H2O: a cache of fixed size that evicts, after every row, the key with the least attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dynmask.baselines.amount import amount_of, check_amount
from dynmask.baselines.policy import Policy, Selector
from dynmask.masks import Lifetimes
from dynmask.masks.lifetimes import NEVER
from dynmask.ops.reference import accumulation_dtype

# Rows whose logits are computed at once, and their cells at most. A row's own work does not grow
# with the length: it looks at what was alive before these rows, and at these.
_ROWS = 128
_CELLS = 1 << 25


class _Cache(NamedTuple):
    """What is left after a call.

    Attributes:
        heavy: Keys kept for their attention.
        recent: Keys kept for being near.
        slots: ``[B, H, A]`` int64, the alive keys, ascending; every head has equally many.
        mass: ``[B, H, A]``, the attention that each got so far.
        expiry: ``[B, H, K]`` int32, of all keys so far.
    """

    heavy: int
    recent: int
    slots: Tensor
    mass: Tensor
    expiry: Tensor


class _Eviction(Selector):
    def __init__(self, heavy: int | float, recent: int | float):
        super().__init__()
        self._heavy = heavy
        self._recent = recent

    def choose(
        self, q: Tensor, k: Tensor, state: _Cache | None, *, scale: float
    ) -> tuple[Lifetimes, _Cache]:
        batch, heads, q_len, _ = q.shape
        k_len = k.shape[2]
        if state is None:
            nothing = torch.empty(batch, heads, 0, device=q.device)
            state = _Cache(
                _tokens(self._heavy, k_len),
                _tokens(self._recent, k_len),
                nothing.long(),
                nothing.to(accumulation_dtype(q.dtype)),
                nothing.int(),
            )
        never = state.expiry.new_full((batch, heads, q_len), NEVER)
        cache = state._replace(expiry=torch.cat([state.expiry, never], 2))
        size = cache.heavy + cache.recent
        rows = max(1, min(_ROWS, _CELLS // (batch * heads * (min(size, k_len) + _ROWS))))
        begin = k_len - q_len
        for top in range(0, q_len, rows):
            cache = _run(q[:, :, top : top + rows], k, cache, begin + top, scale)
        return Lifetimes._trusted(cache.expiry, size + 1), cache


def _tokens(value: int | float, keys: int) -> int:
    # A count may be more than the prompt: the cache goes on to fill.
    return value if isinstance(value, int) else amount_of(value, keys)


def _run(q: Tensor, k: Tensor, cache: _Cache, first: int, scale: float) -> _Cache:
    """Run the rows at slots ``first`` on, one after another; ``cache.expiry`` is filled in place.

    Columns are the keys alive before these rows, then the rows' own. No window key was ever
    evicted, so the last ``recent`` columns up to a row are its window.
    """
    batch, heads, rows, _ = q.shape
    slots, mass, work = cache.slots, cache.mass, cache.mass.dtype
    before = slots.shape[2]
    own = torch.arange(first, first + rows, device=q.device).expand(batch, heads, rows)
    slots = torch.cat([slots, own], 2)
    mass = torch.cat([mass, mass.new_zeros(own.shape)], 2)
    sequence = torch.arange(batch, device=q.device)[:, None, None]
    group = torch.arange(heads, device=q.device)[:, None] // (heads // k.shape[1])
    logits = q.to(work) @ k[sequence, group, slots].to(work).transpose(2, 3) * scale
    hidden = torch.zeros_like(mass)
    evicted = []
    for row in range(rows):
        end = before + row + 1
        mass[..., :end] += (logits[:, :, row, :end] + hidden[..., :end]).softmax(-1)
        if first + row + 1 > cache.heavy + cache.recent:
            least = mass[..., : end - cache.recent].argmin(-1, keepdim=True)
            mass.scatter_(-1, least, torch.inf)
            hidden.scatter_(-1, least, -torch.inf)
            evicted.append(least)
    if evicted:
        # Once the cache is full every row evicts one key: these are the last rows.
        last_row = own[..., rows - len(evicted) :]
        gone = slots.gather(-1, torch.cat(evicted, -1))
        cache.expiry.scatter_(-1, gone, (last_row + 1).int())
        alive = hidden == 0
        slots, mass = (t[alive].view(batch, heads, -1) for t in (slots, mass))
    return cache._replace(slots=slots, mass=mass)


@dataclass(frozen=True)
class H2O(Policy):
    r"""Heavy hitters: the keys with the most attention so far, and a window.

    Row after row, in prefill and decode alike, each query head attends to its cached keys and its
    own, adds the weights to a sum for each key, and then, if more than ``heavy`` keys older than
    the ``recent`` nearest are cached, evicts the one of them with the smallest sum, for good:

    .. math:: s_j = \sum_{i \ge j,\ j \text{ alive at } i} \operatorname{softmax}_j(q_i k^T)

    This is the paper's greedy algorithm. Its authors' code for benchmarks runs the prefill dense
    and evicts once at its end. What is kept does not depend on how tokens are split into calls.
    Each query head has a cache of its own; heads of one kv head may evict different keys.

    Memory is linear in the length; a row costs ``heavy + recent``, a call one copy of the expiries.

    Args:
        heavy: Keys kept for their attention: a count, or a share of the first call's keys (a
            float), rounded up and fixed from then on.
        recent: Nearest keys, kept in any case: a count or a share, likewise.

    Raises:
        ValueError: One of them is no count and no share.

    Source: Zhang et al., arXiv 2306.14048, algorithm 1; a fifth of the length by default.
    """

    heavy: int | float = 0.1
    recent: int | float = 0.1

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "2306.14048"
    selects: ClassVar[str] = "keys with the most attention so far and a window, by eviction"
    stages: ClassVar[tuple[str, ...]] = ("prefill", "decode")

    def __post_init__(self) -> None:
        check_amount("heavy", self.heavy)
        check_amount("recent", self.recent)

    def selector(self, layer: int, layers: int) -> Selector:
        """Return the choice of any layer: all are alike."""
        return _Eviction(self.heavy, self.recent)
