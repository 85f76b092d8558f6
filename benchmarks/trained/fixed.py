"""DMA whose score is not trained: an ablation, for what the score's own gradient does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dynmask.dma.score import ValueScore


@contextmanager
def fixed_scores(fixed: bool) -> Iterator[None]:
    """Let ``Wdt`` and ``A`` of the layers made here stay as initialised; False changes nothing.

    The score still changes, with the values that it reads, and they get its gradient.
    """
    if not fixed:
        yield
        return
    plain = ValueScore.__init__

    def init(self: ValueScore, *args: Any, **named: Any) -> None:
        plain(self, *args, **named)
        self.requires_grad_(False)

    ValueScore.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        ValueScore.__init__ = plain  # type: ignore[method-assign]
