"""Choose what the last token sees key by key, and what as summaries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynmask.dam.keep import keep
from dynmask.dam.kernels import by_kernels
from dynmask.dam.paged_costs import PageStats, page_costs, page_stats
from dynmask.dam.quantized import Quantized
from dynmask.masks.lifetimes import NEVER
from dynmask.ops.reference import accumulation_dtype

if TYPE_CHECKING:
    from dynmask.dam.dynamic import Dynamic


@dataclass(frozen=True, eq=False)
class Pages:
    """The keys of some kv heads, those far from the last one in blocks.

    Attributes:
        keys: ``[B, G, K, D]``.
        means: ``[B, G, n, D]``, the mean key of each of the ``n`` far blocks, the first ones.
        codes: Of at least these blocks in 4 bits, or None.
        block: Keys of a block.
        room: Slots in front of the keys, at least ``n``.
    """

    keys: Tensor
    means: Tensor
    codes: Quantized | None
    block: int
    room: int

    @property
    def count(self) -> int:
        """Far blocks, ``n``."""
        return self.means.shape[2]

    @property
    def near(self) -> Tensor:
        """The keys that are in no far block."""
        return self.keys[:, :, self.count * self.block :]


def select(
    q: Tensor, pages: Pages, settings: Dynamic, real: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Choose the blocks of a decode step; `dynmask.dam.dynamic.Dynamic` says how.

    The estimates are those of keys in 4 bits if there are any, else exact. By kernels nothing
    waits for the device.

    Args:
        q: ``[B, G, R, D]``, the rows of a kv head, all of them the last token's.
        pages: What there is to see; at least one far block.
        settings: How to choose.
        real: ``[B, K]`` bool, which keys are no padding; None for all. A block with padding is
            looked at key by key, and does not count in the softmax.
        scale: Factor of the logits.

    Returns:
        Expiries ``[B, G, room + K]`` int32 over summaries and keys, 0 for what is not seen; and how
        many slots are seen in all batch rows and kv heads, ``[]`` int64.
    """
    allowed = (1 - settings.coverage) ** 2
    if settings.coverage == 1:
        kept = torch.ones(pages.means.shape[:3], dtype=torch.bool, device=q.device)
        return _mask(kept, pages, real)
    stats = _stats(q, pages, scale)
    choose = by_kernels(q, "choose_pages", queries=q.shape[2], pages=pages.count)
    if choose is not None and real is None and pages.codes is not None:
        given = {"block": pages.block, "room": pages.room, "allowed": allowed, "scale": scale}
        found: tuple[Tensor, Tensor] = choose(q, pages.near, stats, **given)
        return found
    near = ((q * scale) @ pages.near.mT).to(accumulation_dtype(q.dtype))
    old = pages.count * pages.block
    if real is not None:
        near = near.masked_fill(~real[:, None, None, old:], float("-inf"))
        whole = real[:, :old].unflatten(1, (pages.count, pages.block)).all(-1)[:, None]
        stats = stats._replace(mass=stats.mass * whole[:, :, None])
    cost = page_costs(stats, near.logsumexp(-1), pages.block)
    if real is not None:
        cost = torch.where(whole, cost, 2.0)  # More than any that may be left.
    limit = torch.full((1,), pages.count, device=q.device)
    leave = by_kernels(cost, "keep") or keep
    return _mask(leave(cost.unsqueeze(2), limit, allowed).squeeze(2), pages, real)


def _stats(q: Tensor, pages: Pages, scale: float) -> PageStats:
    codes, count = pages.codes, pages.count
    if codes is None:
        blocks = pages.keys[:, :, : count * pages.block].unflatten(2, (count, pages.block))
        return page_stats(q, blocks, pages.means, scale)
    run = by_kernels(q, "quantized_stats", queries=q.shape[2], cells=pages.block * q.shape[3])
    if run is not None:
        found: PageStats = run(q, codes, pages.means, count=count, scale=scale)
        return found
    exact = codes.each(lambda t: t[:, :, :count]).keys()
    return page_stats(q.float(), exact, pages.means.float(), scale)


def _mask(kept: Tensor, pages: Pages, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the expiries and the number of slots that the kept blocks ``[B, G, n]`` show."""
    room, count = pages.room, pages.count
    seen = kept.new_ones(*kept.shape[:2], room + pages.keys.shape[2])
    seen[:, :, :count] = ~kept
    seen[:, :, count:room] = False
    of_blocks = slice(room, room + count * pages.block)
    seen[:, :, of_blocks] = kept.repeat_interleave(pages.block, 2)
    if real is not None:
        seen[:, :, room:] &= real[:, None]
    return torch.where(seen, NEVER, 0).int(), seen.sum()
