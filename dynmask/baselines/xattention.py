"""XAttention: key blocks chosen by sums of logits along antidiagonals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from dynmask.baselines.policy import Policy, Selector
from dynmask.masks import Blocks
from dynmask.ops.reference import accumulation_dtype

# Cells of the folded map alive at once; 2^24 float32 are 64 MiB.
_CELLS = 1 << 24


@dataclass(frozen=True)
class XAttention(Policy):
    r"""For each query head and tile of ``block`` rows, as few key blocks as hold ``threshold``.

    Rows and keys are taken in groups of ``S = stride``, counted from the sequence's first token.
    A cell of the folded map is the mean of the logits on one antidiagonal:

    .. math::
        Z_{uw} = \frac{1}{S} \sum_{s < S} \text{logit}(uS + S - 1 - s,\; wS + s), \quad
        A_u = \operatorname{softmax}_{w \le u} Z_u

    A block's mass is the sum of ``A`` over its cells and the tile's rows. A tile sees its own
    block, with ``sink`` the first, and of the others those of largest mass (ties to the earlier)
    until all together hold ``threshold`` of the tile's mass. Each row sees no later key, but which
    blocks it sees may depend on later rows of its tile, never on later tiles.

    Where a length is no multiple of ``block``, or a chunk begins inside a tile, the rows and keys
    of the cut groups that are not in the call count as zeros: their logits are 0. A group
    without any row of the call has no part. So a tile that two chunks share is chosen twice, each
    time by the rows of that chunk. Single rows (decode) run dense.

    Memory: the chosen table, ``[B, H, Q / block, K / block]`` bool, and a part of the folded map.

    Args:
        stride: ``S``: 8 or 16 in the paper; a divisor of ``block``.
        threshold: In (0, 1]: the share of a tile's mass to keep; 1 is plain causal attention.
        block: Rows of a tile and keys of a block.
        sink: Whether every tile sees the first block, as in the authors' code.

    Raises:
        ValueError: A value is out of its range.

    Source: Xu et al., XAttention, arXiv 2503.16428.
    """

    stride: int = 8
    threshold: float = 0.9
    block: int = 128
    sink: bool = True

    name: ClassVar[str] = "xattention"
    paper: ClassVar[str] = "2503.16428"
    selects: ClassVar[str] = "key blocks by sums of antidiagonals"
    stages: ClassVar[tuple[str, ...]] = ("prefill",)

    def __post_init__(self) -> None:
        if self.stride < 1 or self.block < 1 or self.block % self.stride:
            raise ValueError(
                f"block={self.block} must be a multiple of stride={self.stride}, both at least 1"
            )
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} must be above 0 and at most 1")

    def selector(self, layer: int, layers: int) -> Selector:
        """Return the choice of any layer: the rule is one for all."""
        return _XAttention(self)


class _XAttention(Selector):
    remembers = False

    def __init__(self, settings: XAttention):
        super().__init__()
        self._settings = settings

    def choose(
        self, q: Tensor, k: Tensor, state: Any, *, scale: float
    ) -> tuple[Blocks | None, None]:
        if q.shape[2] == 1 or self._settings.threshold == 1:
            return None, None
        block = self._settings.block
        return _lists(_table(q, k, self._settings, scale), block), None


def _table(q: Tensor, k: Tensor, settings: XAttention, scale: float) -> Tensor:
    """Return ``[B, H, T, N]`` bool: the blocks of each tile that has rows in the call."""
    batch, heads, q_len, dim = q.shape
    groups, k_len = k.shape[1:3]
    stride, block = settings.stride, settings.block
    work = accumulation_dtype(q.dtype)
    begin = k_len - q_len
    top, tiles = begin // block, -(-k_len // block)
    after = tiles * block - k_len
    # [B, G, H / G, rows / S, S D], last row of a group first, and [B, G, keys / S, S D].
    rows = functional.pad(q, (0, 0, begin - top * block, after)).unflatten(2, (-1, stride))
    rows = rows.flip(3).reshape(batch, groups, heads // groups, -1, stride * dim)
    keys = functional.pad(k, (0, 0, 0, after)).reshape(batch, groups, -1, stride * dim).to(work)
    fold = block // stride
    at_once = max(1, _CELLS // (batch * heads * fold * keys.shape[2]))
    table = torch.zeros(batch, heads, tiles - top, tiles, dtype=torch.bool, device=q.device)
    for first in range(top, tiles, at_once):
        last = min(first + at_once, tiles)
        group = torch.arange(first * fold, last * fold, device=q.device)
        part = rows[:, :, :, (first - top) * fold : (last - top) * fold].to(work).flatten(2, 3)
        logits = part @ keys[:, :, : last * fold].transpose(2, 3) * (scale / stride)
        later = torch.arange(last * fold, device=q.device) > group[:, None]
        weights = logits.unflatten(2, (-1, len(group))).masked_fill(later, float("-inf"))
        weights = weights.softmax(-1).reshape(batch, heads, len(group), -1)
        absent = ((group + 1) * stride <= begin) | (group * stride >= k_len)
        weights = weights.masked_fill(absent[:, None], 0)
        mass = weights.unflatten(3, (-1, fold)).sum(4).unflatten(2, (-1, fold)).sum(3)
        table[:, :, first - top : last - top, :last] = _smallest(mass, first, settings)
    return table


def _smallest(mass: Tensor, first: int, settings: XAttention) -> Tensor:
    """Return ``[B, H, T, N]`` bool: the smallest sets of enough ``mass [B, H, T, N]``.

    The tiles begin with tile ``first``; each set holds the tile's own block and the sink.
    """
    tiles, blocks = mass.shape[2:]
    forced = torch.ones(tiles, blocks, dtype=torch.bool, device=mass.device)
    forced = forced.tril(first) & forced.triu(first)
    if settings.sink:
        forced[:, 0] = True
    value, index = mass.masked_fill(forced, 0).sort(dim=-1, descending=True, stable=True)
    # What a set holds before each block is added; the forced ones come first.
    before = functional.pad(value.cumsum(-1)[..., :-1], (1, 0))
    before = before + mass.where(forced, 0).sum(-1, keepdim=True)
    wanted = (before < settings.threshold * mass.sum(-1, keepdim=True)) & (value > 0)
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, index, wanted) | forced


def _lists(table: Tensor, block: int) -> Blocks:
    """Return the last tiles' blocks as a mask; tiles before them list nothing."""
    counts = table.sum(-1)
    order = table.byte().sort(dim=-1, descending=True, stable=True).indices
    indices = order[..., : int(counts.max())].int()
    above = table.shape[3] - table.shape[2]
    return Blocks._trusted(
        functional.pad(indices, (0, 0, above, 0)),
        functional.pad(counts.int(), (above, 0)),
        block=block,
        tile=block,
    )
