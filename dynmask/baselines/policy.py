"""What a training-free method is to the engine: for each attention call of a layer, a mask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dynmask.masks import Mask

# Places behind the first token that a generation may go back to. What a call leaves may be as large
# as the keys so far, so that a state for every chunk would grow with the square of the length.
_ENDS = 8
# Keys that tell one sequence from another; beams may share the very last one.
_TOLD_BY = 64


class Policy(ABC):
    """A method and its settings: a frozen dataclass, shared by all layers of a model.

    Attributes:
        name: What the command calls it.
        paper: Its arXiv number.
        selects: What it keeps, in a few words.
        stages: The calls in which it leaves keys out: "prefill", "decode" or both.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    selects: ClassVar[str]
    stages: ClassVar[tuple[str, ...]]

    @abstractmethod
    def selector(self, layer: int, layers: int) -> Selector:
        """Return what chooses the keys of one layer, for one batch of sequences.

        Args:
            layer: The layer's place, from 0.
            layers: How many the model has.
        """

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values, for result files."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]


class _End(NamedTuple):
    """What a call left.

    Attributes:
        at: Where it ended.
        state: For the calls behind it.
        row: Whether it was a single row.
        made: Where the call ended that made the state.
        keys: The last ones there.
    """

    at: int
    state: Any
    row: bool
    made: int
    keys: Tensor | None


def _last(k: Tensor, end: int) -> Tensor:
    """Return ``[B, G, n, D]``, the keys before a slot that tell one sequence from another."""
    return k[:, :, max(0, end - _TOLD_BY) : end].detach()


class Selector(ABC):
    """Chooses the keys of one layer, call by call.

    Calls come in the order of a generation: a prefill, then chunks and single rows, each over all
    keys so far. What was chosen before may matter for what comes (evicted keys do not return), so
    each call goes on from the state that an earlier one left. A generation may go back to the end
    of its last call or of one of the last chunks (a cropped cache); other places have no state.

    Attributes:
        batched: Whether a mask can hold the choice of several batch rows; else each row is a call.
        remembers: Whether a choice depends on the calls before; else they may begin anywhere.
    """

    batched: ClassVar[bool] = True
    remembers: bool = True

    def __init__(self) -> None:
        self._ends = [_End(0, None, row=False, made=0, keys=None)]

    def mask(self, q: Tensor, k: Tensor, *, scale: float) -> Mask | None:
        """Choose what the rows of one call see.

        Args:
            q: ``[B, H, Q, D]``; the rows stand at the last ``Q`` of the ``K`` keys.
            k: ``[B, G, K, D]``, every key so far; whole sequences without padding.
            scale: Factor of the logits.

        Returns:
            The mask of these rows over ``K`` key slots; None for plain causal attention. Heads of a
            mask are kv heads (``G``) or query heads (``H``).

        Raises:
            ValueError: The call goes back to where no call ended, or the batch has other rows than
                there.
        """
        q_len, k_len = q.shape[2], k.shape[2]
        begin = k_len - q_len
        if not self.remembers:
            return self.choose(q, k, None, scale=scale)[0]
        before = [end for end in self._ends if end.at <= begin]
        if before[-1].at != begin:
            ends = ", ".join(str(end.at) for end in self._ends)
            raise ValueError(
                f"a call begins at token {begin}, but this method can go on only where a call "
                f"ended ({ends}): crop the cache to one of these, or start a new prefill"
            )
        known = before[-1].keys
        if known is not None and not torch.equal(known, _last(k, before[-1].made)):
            raise ValueError(
                "the rows of the batch are not those of the call before (beam search, a cache with "
                "other rows), and this method goes on from what it chose for them: generate "
                "without beams, or start a new prefill"
            )
        mask, state = self.choose(q, k, before[-1].state, scale=scale)
        row = q_len == 1
        end = _End(k_len, state, row=row, made=k_len, keys=_last(k, k_len).clone())
        if state is before[-1].state:  # Beams may move as long as it is the prompt's.
            end = end._replace(made=before[-1].made, keys=known)
        if row and before[-1].row:
            del before[-1]  # A long generation must not keep the state of every row.
        start, *later = [*before, end]
        self._ends = [start, *later[-_ENDS:]]
        return mask

    @abstractmethod
    def choose(self, q: Tensor, k: Tensor, state: Any, *, scale: float) -> tuple[Mask | None, Any]:
        """Choose as `mask` does, going on from a state; return the mask and the new state.

        Args:
            q: As in `mask`.
            k: As in `mask`.
            state: What the call before returned; None at the start of a sequence. It must not be
                changed: a generation may come back to it.
            scale: Factor of the logits.
        """
