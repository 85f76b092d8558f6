"""What the trainable methods share: projections, rotary positions, a cache, several sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynmask.masks import Blocks

Angles = tuple[Tensor, Tensor]
"""RoPE's ``cos`` and ``sin``, ``[1, N, d]`` for the positions 0 to ``N - 1``, halves alike."""


class Run(NamedTuple):
    """Key slots ``start`` to ``stop - 1`` of some batch rows: in each row one sequence.

    Attributes:
        rows: ``[R]`` int64, the batch rows.
        start: First slot.
        stop: One past the last slot.
    """

    rows: Tensor
    start: int
    stop: int


@dataclass(eq=False)
class Runs:
    """All runs of a batch.

    A class of its own, into which torch.compile does not look: it would compile a layer anew for
    every number of documents.
    """

    parts: list[Run]


class TrainableAttention(nn.Module):
    """Causal self-attention of a kind that is learned; `attend` says which.

    Keys are cached as they are before RoPE, since a method may need them so.

    Args:
        width: Width of the residual stream.
        heads: ``H``, query heads.
        groups: ``G``, kv heads.
        dim: ``d``, width of a head; even.
        bias: Biases in the projections of queries, keys, values and output.
        impl: What computes the attention, as in `dynmask.attention`.
        layer_idx: The layer's place in a cache.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        groups: int,
        dim: int,
        bias: bool = False,
        impl: str = "auto",
        layer_idx: int = 0,
    ):
        super().__init__()
        self.dim = dim
        self.impl = impl
        self.layer_idx = layer_idx
        self.q_proj = nn.Linear(width, heads * dim, bias=bias)
        self.k_proj = nn.Linear(width, groups * dim, bias=bias)
        self.v_proj = nn.Linear(width, groups * dim, bias=bias)
        self.o_proj = nn.Linear(heads * dim, width, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: Angles,
        runs: Runs | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            hidden_states: ``[B, N, width]``.
            position_embeddings: RoPE's ``cos`` and ``sin`` for at least as many positions as there
                are keys; every run counts its own from 0.
            runs: Where sequences stand, if not one in each row, as long as the row. Rows of the
                result outside of them are 0 (the output's bias, if there is one).
            past_key_values: A cache of transformers, to which the tokens are added.

        Returns:
            ``[B, N, width]``.
        """
        by_head = (*hidden_states.shape[:2], -1, self.dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(hidden_states).view(by_head).transpose(1, 2) for p in projections)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if runs is None:
            out = self.attend(hidden_states, q, k, v, _first(position_embeddings, k.shape[2]))
            out = out.transpose(1, 2).flatten(2)
        else:
            out = self._by_run(hidden_states, q, k, v, position_embeddings, runs)
        return self.o_proj(out)

    def attend(self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, angles: Angles) -> Tensor:
        """Attend within whole sequences of one length.

        Args:
            hidden: ``[B, Q, width]``, what the rows were projected from.
            q: ``[B, H, Q, d]`` before RoPE; the rows are the last ``Q`` of the ``K`` tokens.
            k: ``[B, G, K, d]`` before RoPE.
            v: ``[B, G, K, d]``.
            angles: RoPE's ``cos`` and ``sin``, ``[1, K, d]``.

        Returns:
            ``[B, H, Q, d]``.
        """
        raise NotImplementedError

    @torch.compiler.disable  # It would be compiled anew for the bounds of every batch.
    def _by_run(
        self,
        hidden: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        angles: Angles,
        runs: Runs,
    ) -> Tensor:
        """Return ``[B, N, H d]``, each run attended to by itself."""
        batch, length = hidden.shape[:2]
        before = k.shape[2] - length
        outs, places = [], []
        for rows, start, stop in runs.parts:
            low, high = max(start - before, 0), stop - before
            if high <= low:
                continue
            part = self.attend(
                hidden[rows, low:high],
                q[rows, :, low:high],
                k[rows, :, start:stop],
                v[rows, :, start:stop],
                _first(angles, stop - start),
            )
            outs.append(part.transpose(1, 2).flatten(2).flatten(0, 1))
            places.append(
                (rows[:, None] * length + torch.arange(low, high, device=rows.device)).flatten()
            )
        out = v.new_zeros(batch * length, q.shape[1] * self.dim)
        if outs:
            out = out.index_copy(0, torch.cat(places), torch.cat(outs))
        return out.view(batch, length, -1)


def _first(angles: Angles, length: int) -> Angles:
    cos, sin = angles
    return cos[:, :length], sin[:, :length]


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Apply RoPE to the last tokens that there are angles for: channel ``c`` pairs ``c + d / 2``.

    Args:
        x: ``[B, H, N, d]``.
        angles: ``cos`` and ``sin``, ``[1, at least N, d]``.

    Returns:
        ``[B, H, N, d]`` in x's dtype.

    Source: RoFormer, arXiv 2104.09864, in Llama's order of channels.
    """
    cos, sin = (t[:, None, -x.shape[2] :] for t in angles)
    low, high = x.chunk(2, -1)
    return (x * cos + torch.cat([-high, low], -1) * sin).to(x.dtype)


def row_blocks(indices: Tensor, counts: Tensor, *, block: int, k_len: int) -> Blocks:
    """Return the mask of the last ``Q`` of ``k_len`` slots, each row with blocks of its own.

    Args:
        indices: ``[B, G, Q, M]`` integer key blocks.
        counts: ``[B, G, Q]`` integer, how many of them a row sees.
        block: Key slots of a block.
        k_len: Key slots.
    """
    q_len = indices.shape[2]
    if q_len == 1:
        tile = k_len  # One tile, the last row of which is asked for.
    else:
        tile = 1
        indices = functional.pad(indices, (0, 0, k_len - q_len, 0))
        counts = functional.pad(counts, (k_len - q_len, 0))
    return Blocks._trusted(indices.int(), counts.int(), block=block, tile=tile)
