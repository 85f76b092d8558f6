"""InfLLM: the first keys, the near ones, and the far blocks that a chunk of queries looks up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dynmask.baselines.policy import Policy, Selector
from dynmask.masks import Blocks
from dynmask.ops.reference import accumulation_dtype


class _Memory(NamedTuple):
    """What is known of the keys after a call.

    Attributes:
        units: ``[B, H, U, D]``, of each far block the sum of its representative keys.
        score: ``[B, H, R]``, the logits so far of the keys behind the far blocks.
    """

    units: Tensor
    score: Tensor


class _Lookup(Selector):
    def __init__(self, settings: InfLLM):
        super().__init__()
        self._settings = settings

    def choose(
        self, q: Tensor, k: Tensor, state: _Memory | None, *, scale: float
    ) -> tuple[Blocks | None, _Memory]:
        batch, heads, q_len, dim = q.shape
        k_len, chunk = k.shape[2], self._settings.chunk
        work = accumulation_dtype(q.dtype)
        if state is None:
            nothing = torch.empty(batch, heads, 0, dtype=work, device=q.device)
            state = _Memory(nothing[..., None].expand(-1, -1, -1, dim), nothing)
        begin = first = k_len - q_len
        lists = []
        while first < k_len:
            last = min((first // chunk + 1) * chunk, k_len)
            rows = q[:, :, first - begin : last - begin].to(work)
            units = state.units
            lists.append(self._seen(rows, units, last))
            state = self._advance(rows, k, state, first, last)
            first = last
        if units.shape[2] <= self._settings.top:
            return None, state  # Not even the last chunk had to choose.
        most = max(listed.shape[1] for listed in lists)
        above, tiles = begin // chunk, -(-k_len // chunk)
        indices = torch.zeros(batch, 1, tiles, most, dtype=torch.int32, device=q.device)
        for tile, listed in enumerate(lists, above):
            indices[:, 0, tile, : listed.shape[1]] = listed
        counts = [0] * above + [listed.shape[1] for listed in lists]
        of_tile = torch.tensor(counts, dtype=torch.int32, device=q.device).expand(batch, 1, -1)
        return Blocks._trusted(indices, of_tile, block=self._settings.block, tile=chunk), state

    def _seen(self, rows: Tensor, units: Tensor, last: int) -> Tensor:
        """Return ``[B, M]``: the key blocks that a chunk of rows sees, up to the slot ``last``."""
        settings = self._settings
        blocks = torch.arange(-(-last // settings.block), device=rows.device)
        if units.shape[2] <= settings.top:
            return blocks.expand(len(rows), -1)
        far = settings.init // settings.block
        near = blocks[far + units.shape[2] :]
        relevance = torch.einsum("bhd,bhud->bu", rows.sum(2), units)
        best = relevance.topk(settings.top, -1).indices + far
        return torch.cat([blocks[:far].expand(len(rows), -1), best, near.expand(len(rows), -1)], 1)

    def _advance(self, rows: Tensor, k: Tensor, memory: _Memory, first: int, last: int) -> _Memory:
        """Add what the rows at slots ``first`` to ``last - 1`` say of the keys in their window."""
        settings, units = self._settings, memory.units
        batch, heads, _, dim = rows.shape
        groups = k.shape[1]
        behind = settings.init + units.shape[2] * settings.block
        if last <= behind:
            return memory
        keys = k[:, :, behind:last].to(rows.dtype)
        row, slot = (torch.arange(at, last, device=k.device) for at in (first, behind))
        apart = row[:, None] - slot
        logits = rows.reshape(batch, groups, -1, dim) @ keys.transpose(2, 3)
        logits = logits.view(batch, heads, len(row), len(slot))
        score = logits.masked_fill_((apart < 1) | (apart > settings.local), 0).sum(2)
        score[..., : memory.score.shape[2]] += memory.score
        done = max(0, (last - settings.local - behind) // settings.block)
        if done == 0:
            return _Memory(units, score)
        of_block = score[..., : done * settings.block].unflatten(-1, (done, settings.block))
        best = of_block.topk(settings.representatives, -1).indices
        best = best + torch.arange(done, device=k.device)[:, None] * settings.block
        sequence = torch.arange(batch, device=k.device)[:, None, None, None]
        group = torch.arange(heads, device=k.device)[:, None, None] // (heads // groups)
        new = keys[sequence, group, best].sum(3)
        return _Memory(torch.cat([units, new], 2), score[..., done * settings.block :])


@dataclass(frozen=True)
class InfLLM(Policy):
    r"""The ``init`` first keys, all near ones, and ``top`` far blocks for each chunk of queries.

    A block of keys behind the first ones is far for a chunk once ``local`` tokens lie between them.
    It is known by ``representatives`` of its keys for each query head, those with the largest

    .. math:: r_m = \frac{1}{local} \sum_{j = 1}^{local} q_{m + j} k_m^T

    A chunk sees the far blocks with the largest :math:`\sum_h \sum_i \sum_m q^h_i k_m^T` over all
    its rows, a block's representatives and all query heads, which choose together. All other keys
    up to a row are near: ``local`` of them at least, and up to a chunk and a block more.

    Chunks end where their slots from the first token on do, and where a call ends; a decoded row is
    a chunk of its own. So what a row sees may depend on later rows of its chunk, and on how tokens
    are split into calls. Its keys are those up to itself, always.

    Keys keep the positions that they had. The paper gives all far keys one distance, which matters
    beyond the length that a model was trained for. Its authors' code sums softmax weights in place
    of the logits in ``r``, and likewise chooses for all heads of a layer at once.

    Args:
        init: First keys that every row sees; a multiple of ``block``.
        local: Nearest keys.
        block: Keys of a block.
        representatives: Keys that stand for a block.
        chunk: Query rows that look up together.
        top: Far blocks that they see.

    Raises:
        ValueError: ``init`` is negative or no multiple of ``block``, ``representatives`` more than
            a block has, or another value under 1.

    Source: Xiao et al., arXiv 2402.04617; defaults of its authors' code for Llama 3.
    """

    init: int = 128
    local: int = 4096
    block: int = 128
    representatives: int = 4
    chunk: int = 512
    top: int = 16

    name: ClassVar[str] = "infllm"
    paper: ClassVar[str] = "2402.04617"
    selects: ClassVar[str] = "first keys, near keys and blocks by their representative keys"
    stages: ClassVar[tuple[str, ...]] = ("prefill", "decode")

    def __post_init__(self) -> None:
        for name in ("local", "block", "representatives", "chunk", "top"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.init < 0 or self.init % self.block:
            raise ValueError(f"init={self.init} must be a multiple of block={self.block}, or 0")
        if self.representatives > self.block:
            raise ValueError(
                f"representatives={self.representatives} must be at most block={self.block}"
            )

    def selector(self, layer: int, layers: int) -> Selector:
        """Return the choice of any layer: all are alike."""
        return _Lookup(self)
