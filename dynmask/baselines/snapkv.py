"""SnapKV: after the prefill, keep what the prompt's last rows looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dynmask.baselines.amount import amount_of, check_amount
from dynmask.baselines.policy import Policy, Selector
from dynmask.masks import Lifetimes
from dynmask.masks.lifetimes import NEVER
from dynmask.ops.reference import accumulation_dtype


class _Prompt(NamedTuple):
    """``expiry [B, G, N]`` int32 of the prefill's keys, None if all were kept; ``cap`` tokens."""

    expiry: Tensor | None
    cap: int


class _Snapshot(Selector):
    def __init__(self, settings: SnapKV):
        super().__init__()
        self._settings = settings

    def choose(
        self, q: Tensor, k: Tensor, state: _Prompt | None, *, scale: float
    ) -> tuple[Lifetimes | None, _Prompt]:
        if state is None:
            return None, self._prompt(q, k, scale)
        if state.expiry is None:
            return None, state
        batch, groups, prompt = state.expiry.shape
        later = k.shape[2] - prompt
        expiry = torch.cat([state.expiry, state.expiry.new_full((batch, groups, later), NEVER)], 2)
        return Lifetimes._trusted(expiry, state.cap + later), state

    def _prompt(self, q: Tensor, k: Tensor, scale: float) -> _Prompt:
        """Choose among the keys of the prefill."""
        window, kernel = self._settings.window, self._settings.kernel
        batch, heads, _, dim = q.shape
        groups, length = k.shape[1], k.shape[2]
        cap = max(window, amount_of(self._settings.cap, length))
        if length <= cap:
            return _Prompt(None, cap)
        work = accumulation_dtype(q.dtype)
        last = q[:, :, -window:].to(work).reshape(batch, groups, -1, dim)
        logits = (last @ k.to(work).transpose(2, 3) * scale).view(batch, heads, window, length)
        later = torch.ones(window, window, dtype=torch.bool, device=q.device).triu(1)
        logits[..., -window:].masked_fill_(later, -torch.inf)
        score = logits.softmax(-1)[..., :-window].sum(2)
        score = functional.avg_pool1d(score, kernel, stride=1, padding=kernel // 2)
        score = score.view(batch, groups, -1, length - window).sum(2)
        expiry = torch.full(k.shape[:3], length, dtype=torch.int32, device=k.device)
        expiry.scatter_(-1, score.topk(cap - window, -1).indices, NEVER)
        expiry[..., -window:] = NEVER
        return _Prompt(expiry, cap)


@dataclass(frozen=True)
class SnapKV(Policy):
    r"""Cuts the keys of the prompt to ``cap``: those its last ``window`` rows attend to.

    The first call runs dense. Then key ``j`` of a kv head scores

    .. math:: s_j = \sum_{h \in group} \frac{1}{kernel} \sum_{|j' - j| \le kernel / 2}
        \sum_{i \ge N - window} \operatorname{softmax}_{j'}(q^h_i k^T)

    over the keys before the window. The ``cap - window`` highest and the window stay, the others
    are gone for all later calls; tokens of those calls all stay. Only what the first call holds is
    cut, so a prompt has to come in one call, with the question if the question is to choose.

    The paper leaves grouped queries open: its authors' code chooses for each query head and stores
    every head's keys. Here the heads of a group choose together by the sum of their scores (the
    mean in NVIDIA's kvpress, which ranks alike), so that the cache shrinks.

    Args:
        cap: Keys kept of the prompt, the window included: a count, or a share of the first call's
            keys (a float), rounded up; a share never keeps less than the window.
        window: Last rows of the prompt that choose.
        kernel: Neighbouring keys whose scores are averaged, zeros beyond the ends; odd.

    Raises:
        ValueError: ``cap`` is no count above ``window`` and no share, ``window`` is under 1, or
            ``kernel`` even or under 1.

    Source: Li et al., arXiv 2404.14469; mean pooling and defaults as in its authors' code.
    """

    cap: int | float = 1024
    window: int = 32
    kernel: int = 5

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "2404.14469"
    selects: ClassVar[str] = "keys of the prompt that its last rows attend to"
    stages: ClassVar[tuple[str, ...]] = ("decode",)

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} must be odd, so that it has a middle")
        check_amount("cap", self.cap)
        if isinstance(self.cap, int) and self.cap <= self.window:
            raise ValueError(
                f"cap={self.cap} must be larger than window={self.window}, which it includes"
            )

    def selector(self, layer: int, layers: int) -> Selector:
        """Return the choice of any layer: all are alike."""
        return _Snapshot(self)
