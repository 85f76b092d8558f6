"""Masks made of columns (keys every later row sees) and offsets (distances every row sees)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dynmask.masks.padding import Padding


@dataclass(frozen=True, eq=False)
class Stripes:
    """Columns and offsets per head: DAM's extended mask (arXiv 2506.11104, section 3.3).

    Head ``h``: row ``i`` sees key ``j`` iff ``j <= i`` and (``full_heads[h]`` or
    ``j in columns[h]`` or ``i - j in offsets[h]`` or (``corner`` is given, ``i < L`` and
    ``corner[h, i, j]``)). ``i`` and ``j`` count from the sequence's own first token, so padding
    moves nothing.

    Args:
        columns: ``H`` sorted, unique int64 tensors of positions, any lengths.
        offsets: ``H`` sorted, unique int64 tensors of distances; each begins with 0, the own
            token, so that no row is empty.
        full_heads: ``[H]`` bool, heads that see every earlier key.
        corner: ``[H, L, L]`` bool, causal: the captured true mask, added to rows ``i < L``.
        padding: Which key slots hold real tokens; None means all.

    Raises:
        ValueError: If a tensor breaks the above.
    """

    columns: tuple[Tensor, ...]
    offsets: tuple[Tensor, ...]
    full_heads: Tensor
    corner: Tensor | None = None
    padding: Padding | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "offsets", tuple(self.offsets))
        heads = len(self.columns)
        if len(self.offsets) != heads or heads == 0:
            raise ValueError(
                f"columns and offsets must have one tensor per head, got {heads} and "
                f"{len(self.offsets)}: use an empty int64 tensor for a head without columns"
            )
        if self.full_heads.shape != (heads,) or self.full_heads.dtype != torch.bool:
            raise ValueError(
                f"full_heads must be [{heads}] bool, got {list(self.full_heads.shape)} "
                f"{self.full_heads.dtype}: pass torch.zeros({heads}, dtype=torch.bool) for none"
            )
        for head in range(heads):
            _check_positions(f"columns[{head}]", self.columns[head])
            _check_positions(f"offsets[{head}]", self.offsets[head])
            if len(self.offsets[head]) == 0 or self.offsets[head][0] != 0:
                raise ValueError(f"offsets[{head}] must contain 0: every row sees its own token")
        if self.corner is not None:
            self._check_corner(self.corner)
        if self.padding is not None and self.padding.start.device != self.device:
            raise ValueError(
                f"padding is on {self.padding.start.device}, the mask on {self.device}: "
                "use padding.to(device)"
            )

    def _check_corner(self, corner: Tensor) -> None:
        if (
            corner.dim() != 3
            or corner.shape[0] != self.heads
            or corner.shape[1] != corner.shape[2]
            or corner.dtype != torch.bool
        ):
            raise ValueError(
                f"corner must be [{self.heads}, L, L] bool, got {list(corner.shape)} {corner.dtype}"
            )
        if bool(corner.triu(1).any()):
            raise ValueError("corner shows a later key to an earlier row: pass corner.tril()")

    @classmethod
    def causal(cls, heads: int, *, device: torch.device | str = "cpu") -> Stripes:
        """Return the plain causal mask: every head full."""
        return cls(
            columns=tuple(torch.empty(0, dtype=torch.int64, device=device) for _ in range(heads)),
            offsets=tuple(torch.zeros(1, dtype=torch.int64, device=device) for _ in range(heads)),
            full_heads=torch.ones(heads, dtype=torch.bool, device=device),
        )

    @classmethod
    def streaming(
        cls, heads: int, *, sinks: int, window: int, device: torch.device | str = "cpu"
    ) -> Stripes:
        """Return StreamingLLM's mask: ``sinks`` first keys and ``window`` nearest keys.

        Args:
            heads: Number of query heads.
            sinks: First tokens that every row sees.
            window: Nearest tokens that every row sees, its own included; at least 1.
            device: Where the tensors live.

        Raises:
            ValueError: If ``sinks < 0`` or ``window < 1``.

        Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
        arXiv 2309.17453.
        """
        if sinks < 0 or window < 1:
            raise ValueError(f"need sinks >= 0 and window >= 1, got {sinks} and {window}")
        return cls(
            columns=(torch.arange(sinks, device=device),) * heads,
            offsets=(torch.arange(window, device=device),) * heads,
            full_heads=torch.zeros(heads, dtype=torch.bool, device=device),
        )

    @property
    def heads(self) -> int:
        """Number of query heads ``H``."""
        return len(self.columns)

    @property
    def device(self) -> torch.device:
        """Where the mask's tensors live."""
        return self.full_heads.device

    def __and__(self, padding: Padding) -> Stripes:
        """Return the same stripes over a padded batch.

        The result shares everything that was derived from the stripes so far, so this is cheap
        enough for every decode step.

        Raises:
            ValueError: If this mask is padded already.
        """
        if not isinstance(padding, Padding):
            return NotImplemented
        if self.padding is not None:
            raise ValueError("the mask is padded already: combine the unpadded mask instead")
        if padding.start.device != self.device:
            padding = padding.to(self.device)
        # A copy takes over only what is cached by now.
        _ = self.derived, self.merged_corner, self.all_full
        padded = copy.copy(self)
        object.__setattr__(padded, "padding", padding)
        return padded

    def to(self, device: torch.device | str) -> Stripes:
        """Return the same mask on ``device``."""
        if torch.device(device) == self.device:
            return self
        # Checked when it was made, and on a GPU every check would wait for the device.
        moved = object.__new__(Stripes)
        moved.__dict__.update(
            columns=tuple(c.to(device) for c in self.columns),
            offsets=tuple(o.to(device) for o in self.offsets),
            full_heads=self.full_heads.to(device),
            corner=None if self.corner is None else self.corner.to(device),
            padding=None if self.padding is None else self.padding.to(device),
        )
        return moved

    def dense(self, q_len: int, k_len: int | None = None) -> Tensor:
        """Return the mask as a matrix, for tests and pictures.

        Query row ``i`` stands at key slot ``k_len - q_len + i``. Rows and keys outside a batch
        row's padding are False.

        Args:
            q_len: Query rows ``Q``.
            k_len: Key slots ``K``; ``q_len`` by default.

        Returns:
            ``[B, H, Q, K]`` bool, ``B`` = 1 without padding.

        Raises:
            ValueError: If ``q_len > k_len`` or ``q_len < 0``.
        """
        k_len = q_len if k_len is None else k_len
        if not 0 <= q_len <= k_len:
            raise ValueError(f"need 0 <= q_len <= k_len, got {q_len} and {k_len}")
        return self.slots(k_len - q_len, k_len, k_len)

    def slots(self, first: int, last: int, k_len: int) -> Tensor:
        """Return ``[B or 1, H, last - first, k_len]`` bool: rows at key slots first to last - 1."""
        if self.padding is None:
            return self._run_of_rows(first, last, k_len)[None]
        runs = self.padding.runs(k_len)
        out = torch.zeros(
            len(runs), self.heads, last - first, k_len, dtype=torch.bool, device=self.device
        )
        for b, (start, stop) in enumerate(runs):
            top, bottom = max(first, start), min(last, stop)
            if top < bottom:
                out[b, :, top - first : bottom - first, start:stop] = self._run_of_rows(
                    top - start, bottom - start, stop - start
                )
        return out

    def rows(self, positions: Tensor, k_len: int) -> Tensor:
        """Return some rows of one sequence's mask; padding is left out of account.

        Args:
            positions: ``[R]`` int64 on the mask's device, in ``[0, k_len)``, any order.
            k_len: Tokens of the sequence.

        Returns:
            ``[H, R, k_len]`` bool.

        Raises:
            ValueError: If a position is no row of the sequence.
        """
        if positions.dim() != 1 or positions.dtype != torch.int64:
            raise ValueError(
                f"positions must be a 1-d int64 tensor, got {list(positions.shape)} "
                f"{positions.dtype}"
            )
        if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < k_len:
            raise ValueError(
                f"positions must lie in [0, {k_len}), got {int(positions.min())} to "
                f"{int(positions.max())}"
            )
        return self._build_rows(positions, k_len)

    def _build_rows(self, positions: Tensor, k_len: int) -> Tensor:
        distance = positions[:, None] - torch.arange(k_len, device=self.device)
        near = distance.clamp_min(0)
        seen = torch.stack(
            [
                _indicator(c, k_len) | _indicator(o, k_len)[near]
                for c, o in zip(self.columns, self.offsets, strict=True)
            ]
        )
        seen |= self.full_heads[:, None, None]
        if self.corner is not None:
            inside = (positions < self.corner.shape[1]).nonzero().flatten()
            right = min(k_len, self.corner.shape[1])
            seen[:, inside, :right] |= self.corner[:, positions[inside], :right]
        return seen & (distance >= 0)

    def _run_of_rows(self, first: int, last: int, k_len: int) -> Tensor:
        """Return ``rows`` ``first`` to ``last - 1``, from the cache where the corner holds them."""
        if self.merged_corner is not None and k_len <= self.merged_corner.shape[1]:
            return self.merged_corner[:, first:last, :k_len]
        return self._build_rows(torch.arange(first, last, device=self.device), k_len)

    def density(self, length: int) -> Tensor:
        """Return ``[H]`` float64: visible pairs over causal pairs of one sequence.

        Exact and linear in the number of stripes; padding is left out of account.

        Args:
            length: Tokens ``N`` of the sequence.

        Raises:
            ValueError: If ``length < 1``.
        """
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        return self._pairs_above(length).double() / (length * (length + 1) / 2)

    def visible_pairs(self, q_len: int, k_len: int | None = None) -> Tensor:
        """Count the (query, key) pairs that the mask shows, without building it.

        Args:
            q_len: Query rows ``Q``, the last ones of the sequence.
            k_len: Key slots ``K``; ``q_len`` by default.

        Returns:
            ``[B, H]`` int64, ``B`` = 1 without padding.
        """
        k_len = q_len if k_len is None else k_len
        runs = [(0, k_len)] if self.padding is None else self.padding.runs(k_len)
        counts = []
        for start, stop in runs:
            first = min(max(k_len - q_len, start), stop)
            counts.append(self._pairs_above(stop - start) - self._pairs_above(first - start))
        return torch.stack(counts)

    def _pairs_above(self, length: int) -> Tensor:
        """Count ``[H]`` visible pairs in rows ``0 .. length - 1`` of one sequence.

        A column c is seen by ``N - c`` rows, an offset r by ``N - r`` rows, and both meet at row
        ``c + r``, so the union is the sum less the pairs with ``c + r < N``.
        """
        counts = []
        for c, r in zip(self.columns, self.offsets, strict=True):
            c, r = c[c < length], r[r < length]
            both = torch.searchsorted(r, length - c)
            counts.append((length - c).sum() + (length - r).sum() - both.sum())
        total = torch.stack(counts)
        if self._corner_extra is not None:
            total += self._corner_extra[:, min(length, self._corner_extra.shape[1] - 1)]
        return torch.where(self.full_heads, length * (length + 1) // 2, total)

    def of_heads(self, heads: Sequence[int]) -> Stripes:
        """Return the stripes of some heads, without padding.

        Args:
            heads: Their numbers, at least one.
        """
        index = torch.tensor(list(heads), device=self.device)
        return Stripes(
            columns=tuple(self.columns[h] for h in heads),
            offsets=tuple(self.offsets[h] for h in heads),
            full_heads=self.full_heads[index],
            corner=None if self.corner is None else self.corner[index],
        )

    @property
    def unpadded(self) -> Stripes:
        """The same stripes for one sequence without padding."""
        _ = self.derived
        plain = copy.copy(self)
        object.__setattr__(plain, "padding", None)
        return plain

    @cached_property
    def all_full(self) -> bool:
        """Whether every head is full: plain causal attention, up to padding."""
        return bool(self.full_heads.all())

    @cached_property
    def merged_corner(self) -> Tensor | None:
        """``[H, L, L]`` bool: everything that rows ``i < L`` see, or None without a corner."""
        if self.corner is None:
            return None
        length = self.corner.shape[1]
        return self._build_rows(torch.arange(length, device=self.device), length)

    @cached_property
    def _corner_extra(self) -> Tensor | None:
        """``[H, L + 1]`` pairs that only the corner shows, summed over the rows before ``i``."""
        if self.corner is None or self.merged_corner is None:
            return None
        plain = copy.copy(self)
        object.__setattr__(plain, "corner", None)
        length = self.corner.shape[1]
        extra = (
            self.merged_corner
            & ~plain._build_rows(torch.arange(length, device=self.device), length)
        ).sum(2)
        return torch.nn.functional.pad(extra.cumsum(1), (1, 0))

    @cached_property
    def derived(self) -> dict[Any, Any]:
        """Scratch space for what an op derives from the stripes; shared with padded copies."""
        return {}


def _check_positions(name: str, value: Tensor) -> None:
    if value.dim() != 1 or value.dtype != torch.int64:
        raise ValueError(
            f"{name} must be a 1-d int64 tensor, got {list(value.shape)} {value.dtype}"
        )
    if len(value) and (bool(value[0] < 0) or bool((value.diff() <= 0).any())):
        raise ValueError(f"{name} must be non-negative, sorted and unique: pass {name}.unique()")


def _indicator(positions: Tensor, size: int) -> Tensor:
    """Return ``[size]`` bool, True at ``positions``."""
    seen = torch.zeros(size, dtype=torch.bool, device=positions.device)
    seen[positions[positions < size]] = True
    return seen
