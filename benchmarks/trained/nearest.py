"""Rows that also see the keys nearest to them: an ablation of DMA, which forces none into the set.

A layer's mask is widened while a model is trained and measured. The package has the same as an
option since, `DmaConfig.window`, whose ``keep`` counts the nearest keys too. Rows measured
before are known by their recipes, which say it in this way; so the ablation goes on as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dynmask.dma import DynamicMaskAttention
from dynmask.masks import Lifetimes
from dynmask.masks.lifetimes import NEVER


def widened(mask: Lifetimes, count: int) -> Lifetimes:
    """The mask of rows that see their nearest keys, and what ``mask`` shows the row before those.

    A key enters the choice when it is no longer near. So row ``i`` sees the keys ``i - count + 1``
    to ``i`` and what row ``i - count`` of ``mask`` sees, and every key lives ``count`` rows longer.

    Args:
        mask: of no padding and one document, such as `Lifetimes.top`.
        count: nearest keys of each row, the own one included.
    """
    later = mask.expiry.clamp_max(NEVER - count) + count
    expiry = torch.where(mask.expiry == NEVER, mask.expiry, later)
    return Lifetimes(expiry, None if mask.most is None else mask.most + count)


@contextmanager
def nearest(count: int) -> Iterator[None]:
    """Let the rows of all DMA layers see their ``count`` nearest keys too; 0 changes nothing."""
    if not count:
        yield
        return
    chosen = DynamicMaskAttention._select

    def select(self: DynamicMaskAttention, *args: Any) -> tuple[Any, Any, Any, Lifetimes]:
        _, _, _, slots, cache = args
        if cache is not None or slots.real is not None or slots.documents is not None:
            raise ValueError("nearest keys: without cache, padding and documents only")
        k, v, score, mask = chosen(self, *args)
        return k, v, score, widened(mask, count)

    DynamicMaskAttention._select = select  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        DynamicMaskAttention._select = chosen  # type: ignore[method-assign]
