"""Masks that show each tile of query rows a list of key blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmask.masks.checks import require_integer, require_tensor
from dynmask.masks.padding import Padding

# Entries of lists that are counted at once: some temporaries of 8 MiB.
_CELLS = 1 << 20


@dataclass(frozen=True, eq=False)
class Blocks:
    """Rows of query tile ``t`` see the key blocks ``indices[b, g, t, :counts[b, g, t]]``, causally.

    Row ``i`` is in tile ``i // tile`` and key ``j`` in block ``j // block``, both counted in key
    slots, so the same mask serves prefill, chunks and decode. Row ``i`` sees key ``j`` iff
    ``j <= i`` and the tile lists the block (and both are real tokens, with padding).

    Args:
        indices: ``[B, G, T, M]`` int32 key blocks, the first ``counts`` of a tile distinct, in any
            order; what comes behind is not read. ``B`` and ``G`` may be 1.
        counts: ``[B, G, T]`` int32, how many blocks the tile sees, 0 to ``M``.
        block: Key slots of a block.
        tile: Query slots of a tile.
        padding: Which key slots hold real tokens; None means all.

    Raises:
        ValueError: If a tensor breaks the above, or ``block`` or ``tile`` is under 1.

    Source: the block lists of NSA (arXiv 2502.11089), MoBA (arXiv 2502.13189) and others.
    """

    indices: Tensor
    counts: Tensor
    block: int
    tile: int
    padding: Padding | None = None

    def __post_init__(self) -> None:
        indices, counts = self.indices, self.counts
        require_tensor("indices", indices)
        require_tensor("counts", counts)
        require_integer("block", self.block)
        require_integer("tile", self.tile)
        if indices.dim() != 4 or indices.dtype != torch.int32:
            raise ValueError(
                f"indices must be [B, G, T, M] int32, got {list(indices.shape)} {indices.dtype}"
            )
        if counts.shape != indices.shape[:3] or counts.dtype != torch.int32:
            raise ValueError(
                f"counts must be {list(indices.shape[:3])} int32, got {list(counts.shape)} "
                f"{counts.dtype}"
            )
        if counts.device != indices.device:
            raise ValueError(f"counts are on {counts.device} but indices on {indices.device}")
        if self.block < 1 or self.tile < 1:
            raise ValueError(f"block and tile must be at least 1, got {self.block} and {self.tile}")
        if not torch.compiler.is_compiling():
            self._check_values()
        if self.padding is not None:
            self._check_padding(self.padding)

    @classmethod
    def _trusted(
        cls,
        indices: Tensor,
        counts: Tensor,
        *,
        block: int,
        tile: int,
        padding: Padding | None = None,
    ) -> Blocks:
        """Return a mask known to be right: on a GPU every check would wait for the device."""
        if torch.compiler.is_compiling():
            return cls(indices, counts, block, tile, padding)  # It skips them, and can be traced.
        made = object.__new__(cls)
        made.__dict__.update(
            indices=indices, counts=counts, block=block, tile=tile, padding=padding
        )
        return made

    def _check_values(self) -> None:
        if bool(((self.counts < 0) | (self.counts > self.indices.shape[3])).any()):
            raise ValueError(
                f"counts must lie in [0, {self.indices.shape[3]}], the width of indices"
            )
        if bool((self._listed & (self.indices < 0)).any()):
            raise ValueError("indices must not be negative where counts says that they are read")
        ordered = self.indices.masked_fill(~self._listed, -1).sort(-1).values
        if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
            raise ValueError("indices list a block twice for one tile: make them unique")

    def _check_padding(self, padding: Padding) -> None:
        rows, batch = len(padding.start), self.indices.shape[0]
        if padding.start.device != self.device:
            raise ValueError(
                f"padding is on {padding.start.device}, the mask on {self.device}: "
                "use padding.to(device)"
            )
        if rows != batch and 1 not in (rows, batch):
            raise ValueError(f"padding has {rows} rows but the mask's batch is {batch}")

    @property
    def _listed(self) -> Tensor:
        """``[B, G, T, M]`` bool, which entries of ``indices`` are read."""
        return self._listed_by(0, self.indices.shape[2])

    def _listed_by(self, first: int, last: int) -> Tensor:
        """``[B, G, last - first, M]`` bool, which entries of these tiles are read."""
        place = torch.arange(self.indices.shape[3], device=self.device)
        return place < self.counts[:, :, first:last, None]

    @property
    def device(self) -> torch.device:
        """Where the mask's tensors live."""
        return self.indices.device

    @property
    def capacity(self) -> int:
        """Key slots that the tiles reach, ``T * tile``: the longest ``k_len``."""
        return self.indices.shape[2] * self.tile

    def to(self, device: torch.device | str) -> Blocks:
        """Return the same mask on ``device``."""
        if torch.device(device) == self.device:
            return self
        padding = None if self.padding is None else self.padding.to(device)
        lists = self.indices.to(device), self.counts.to(device)
        return self._trusted(*lists, block=self.block, tile=self.tile, padding=padding)

    def __and__(self, padding: Padding) -> Blocks:
        """Return the same blocks for padded batch rows.

        Raises:
            ValueError: If this mask is padded already, or the batch sizes differ.
        """
        if not isinstance(padding, Padding):
            return NotImplemented
        if self.padding is not None:
            raise ValueError("the mask is padded already: combine the unpadded mask instead")
        if padding.start.device != self.device:
            padding = padding.to(self.device)
        self._check_padding(padding)
        lists = self.indices, self.counts
        return self._trusted(*lists, block=self.block, tile=self.tile, padding=padding)

    def table(self, first: int, last: int, k_len: int) -> Tensor:
        """Return ``[B, G, last - first, blocks]`` bool: which key blocks each tile lists.

        Args:
            first: First tile.
            last: One past the last tile.
            k_len: Key slots; blocks that begin beyond them are left out.
        """
        blocks = -(-k_len // self.block)
        indices = self.indices[:, :, first:last].long()
        listed = self._listed_by(first, last) & (indices < blocks)
        out = torch.zeros(
            *indices.shape[:3], blocks + 1, dtype=torch.bool, device=self.device
        )  # The last column takes what is not read.
        out.scatter_(-1, indices.where(listed, blocks), True)
        return out[..., :blocks]

    def dense(self, q_len: int, k_len: int | None = None) -> Tensor:
        """Return the mask as a matrix, for tests and pictures.

        Args:
            q_len: Query rows ``Q``; row ``i`` stands at key slot ``K - Q + i``.
            k_len: Key slots ``K``; ``q_len`` by default.

        Returns:
            ``[B, G, Q, K]`` bool.

        Raises:
            ValueError: If not ``0 <= q_len <= k_len``, or the tiles do not reach ``k_len``.
        """
        k_len = q_len if k_len is None else k_len
        if not 0 <= q_len <= k_len <= self.capacity:
            raise ValueError(
                f"need 0 <= q_len <= k_len <= {self.capacity} (tiles times tile), got {q_len} "
                f"and {k_len}"
            )
        return self.slots(k_len - q_len, k_len, k_len)

    def slots(self, first: int, last: int, k_len: int) -> Tensor:
        """Return ``[B, G, last - first, k_len]`` bool: rows at key slots first to last - 1."""
        row = torch.arange(first, last, device=self.device)
        key = torch.arange(k_len, device=self.device)
        top = first // self.tile
        table = self.table(top, -(-last // self.tile), k_len)
        seen = table[:, :, row // self.tile - top][..., key // self.block]
        seen = seen & (key <= row[:, None])
        if self.padding is not None:
            start, stop = self.padding.start[:, None], self.padding.stop[:, None]
            real_row = (row >= start) & (row < stop)
            real_key = (key >= start) & (key < stop)
            seen = seen & (real_row[:, None, :, None] & real_key[:, None, None])
        return seen

    def visible_pairs(self, q_len: int, k_len: int | None = None) -> Tensor:
        """Count the (query, key) pairs that the lists show; padding is left out of account.

        Exact and linear in the size of these rows' lists.

        Args:
            q_len: Query rows ``Q``, the last ones of the sequence.
            k_len: Key slots ``K``; ``q_len`` by default.

        Returns:
            ``[B, G]`` int64.

        Raises:
            ValueError: If not ``0 <= q_len <= k_len <= capacity``.
        """
        k_len = q_len if k_len is None else k_len
        if not 0 <= q_len <= k_len <= self.capacity:
            raise ValueError(
                f"need 0 <= q_len <= k_len <= {self.capacity} (tiles times tile), got {q_len} "
                f"and {k_len}"
            )
        batch, groups, _, width = self.indices.shape
        pairs = torch.zeros(batch, groups, dtype=torch.int64, device=self.device)
        at_once = max(1, _CELLS // max(1, batch * groups * width))
        last = -(-k_len // self.tile)
        for top in range((k_len - q_len) // self.tile, last, at_once):
            pairs += self._pairs_of(top, min(top + at_once, last), q_len, k_len)
        return pairs

    def _pairs_of(self, first: int, last: int, q_len: int, k_len: int) -> Tensor:
        """Return ``[B, G]``, the visible pairs of the rows of some tiles."""
        begin = self.indices[:, :, first:last].long() * self.block
        width = (k_len - begin).clamp(0, self.block)
        bottom = torch.arange(first, last, device=self.device)[:, None] * self.tile

        def pairs_above(row: Tensor) -> Tensor:
            """Count the causal pairs of each block with the rows before ``row``."""
            rows = (row.clamp(k_len - q_len, k_len) - begin).clamp_min(0)
            inside = torch.minimum(rows, width)
            return inside * (inside + 1) // 2 + (rows - inside) * width

        pairs = pairs_above(bottom + self.tile) - pairs_above(bottom)
        return pairs.masked_fill(~self._listed_by(first, last), 0).sum((-1, -2))

    def density(self, length: int) -> Tensor:
        """Return ``[B, G]`` float64: visible pairs over causal pairs of one sequence.

        Exact and linear in the size of the lists; padding is left out of account.

        Args:
            length: Tokens ``N`` of the sequence.

        Raises:
            ValueError: If not ``1 <= length <= capacity``.
        """
        if not 1 <= length <= self.capacity:
            raise ValueError(f"length must lie in [1, {self.capacity}], got {length}")
        return self.visible_pairs(length).double() / (length * (length + 1) / 2)
