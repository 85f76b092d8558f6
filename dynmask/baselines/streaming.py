"""StreamingLLM and the sliding window: the first keys and the nearest, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dynmask.baselines.policy import Policy, Selector
from dynmask.masks import Lifetimes


class _Window(Selector):
    remembers = False

    def __init__(self, window: int, sinks: int):
        super().__init__()
        self._window = window
        self._sinks = sinks

    def choose(self, q: Tensor, k: Tensor, state: Any, *, scale: float) -> tuple[Lifetimes, None]:
        mask = Lifetimes.window(k.shape[2], window=self._window, sinks=self._sinks, device=k.device)
        return mask, None


@dataclass(frozen=True)
class StreamingLLM(Policy):
    r"""Attention sinks and a window: row ``i`` sees ``j < sinks`` and ``i - j < window``.

    Keys keep the positions that they had. The paper counts positions inside the cache, which
    matters beyond the length that a model was trained for only.

    Args:
        window: Nearest keys, the own one included.
        sinks: First keys.

    Raises:
        ValueError: ``window`` is under 1 or ``sinks`` under 0.

    Source: Xiao et al., arXiv 2309.17453.
    """

    window: int = 1020
    sinks: int = 4

    name: ClassVar[str] = "streaming"
    paper: ClassVar[str] = "2309.17453"
    selects: ClassVar[str] = "first tokens and a window"
    stages: ClassVar[tuple[str, ...]] = ("prefill", "decode")

    def __post_init__(self) -> None:
        if self.window < 1 or self.sinks < 0:
            raise ValueError(f"need window >= 1 and sinks >= 0, got {self.window} and {self.sinks}")

    def selector(self, layer: int, layers: int) -> Selector:
        """Return the choice of any layer: all are alike."""
        return _Window(self.window, self.sinks)


@dataclass(frozen=True)
class SlidingWindow(Policy):
    """The nearest ``window`` keys, the own one included.

    Args:
        window: Nearest keys, the own one included.

    Raises:
        ValueError: ``window`` is under 1.

    Source: Beltagy et al., Longformer, arXiv 2004.05150.
    """

    window: int = 1024

    name: ClassVar[str] = "window"
    paper: ClassVar[str] = "2004.05150"
    selects: ClassVar[str] = "a window"
    stages: ClassVar[tuple[str, ...]] = ("prefill", "decode")

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")

    def selector(self, layer: int, layers: int) -> Selector:
        """Return the choice of any layer: all are alike."""
        return _Window(self.window, 0)
