"""The cpu backend's inner loop: one head's stripes over one sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmask.masks.schedule import Chunk, HeadSchedule
from dynmask.ops.reference import accumulation_dtype
from dynmask.ops.softmax import softmax_, softmax_with_lse_

# Rows over which a lone offset's product runs at once.
_LONE_ROWS = 4096
_OUT = float("-inf")


@dataclass(frozen=True, eq=False)
class Keys:
    """One key head, copied so that every window of a schedule is a view of the copy.

    The copy begins at position ``base``, which is negative where windows reach before the first
    token, and ends a tile after the last token; both ends are zeros.

    Attributes:
        k: ``[K, D]``, as given.
        v: ``[K, D]``, as given.
        bias: ``[K]`` in the accumulation dtype, or None.
        window_k: ``[K - base + tile, D]`` in the accumulation dtype, contiguous.
        window_v: The same for the values.
        base: Position of ``window_k[0]``.
        first: First row that will be computed.
    """

    k: Tensor
    v: Tensor
    bias: Tensor | None
    window_k: Tensor
    window_v: Tensor
    base: int
    first: int

    @classmethod
    def build(
        cls, k: Tensor, v: Tensor, bias: Tensor | None, schedules: list[HeadSchedule], first: int
    ) -> Keys:
        """Copy what the heads that share these keys need for rows ``first`` and later."""
        work = accumulation_dtype(k.dtype)
        length = k.shape[0]
        base = first - max(s.reach for s in schedules)
        size = length - base + max(s.tile for s in schedules)

        def window(source: Tensor) -> Tensor:
            copy = torch.zeros(size, k.shape[1], dtype=work)
            copy[max(-base, 0) : length - base] = source[max(base, 0) :]
            return copy

        bias = None if bias is None else bias.to(work)
        return cls(k, v, bias, window(k), window(v), base, first)

    def fence(self, columns: Tensor) -> Tensor:
        """Return ``[len(window_k)]``: what to add to a window's logits, by key.

        -inf before the first token and at the columns, which are counted as columns; else the bias.
        """
        fence = self.window_k.new_zeros(len(self.window_k))
        if self.bias is not None:
            fence[max(-self.base, 0) : len(self.k) - self.base] = self.bias[max(self.base, 0) :]
        fence[: max(-self.base, 0)] = _OUT
        fence[columns[columns >= self.base] - self.base] = _OUT
        return fence


def attend_head(
    q: Tensor, keys: Keys, schedule: HeadSchedule, scale: float, out: Tensor, lse: Tensor | None
) -> None:
    """Fill ``out [n, D]`` and ``lse [n]`` for the last ``n`` rows ``q [n, D]`` of one head."""
    head = _Head(q, keys, schedule, scale, lse is not None)
    head.run()
    out.copy_(head.out[: len(q)])
    if lse is not None:
        lse.copy_(head.lse[: len(q)])


class _Head:
    """Buffers of one head and the pieces that fill them."""

    def __init__(
        self, q: Tensor, keys: Keys, schedule: HeadSchedule, scale: float, want_lse: bool
    ) -> None:
        self.keys, self.schedule, self.want_lse = keys, schedule, want_lse
        rows, dim = q.shape
        length, tile = len(keys.k), schedule.tile
        work = keys.window_k.dtype
        # Whole tiles: rows past the end are zeros and are dropped.
        self.q = torch.zeros(-(-rows // tile) * tile, dim, dtype=work)
        self.q[:rows] = q
        self.q *= scale
        self.out = torch.empty_like(self.q)
        self.lse = torch.empty(len(self.q), dtype=work)
        self.columns = schedule.columns[schedule.columns < length]
        self.column_k = keys.k.index_select(0, self.columns).to(work)
        self.column_v = keys.v.index_select(0, self.columns).to(work)
        self.column_bias = None if keys.bias is None else keys.bias[self.columns]
        self.fence = keys.fence(self.columns)
        # Row t of a tile starts its window at T - 1 - t.
        self.band_masks = [
            f.to(work).unfold(0, len(f) - tile + 1, 1).flip(0) for f in schedule.fences
        ]
        self.lone = [r for r in schedule.lone if r < length]

    def run(self) -> None:
        tile = self.schedule.tile
        first = self.keys.first
        chunks = list(self.schedule.chunks(first, len(self.keys.k)))
        cells = max(c.rows * (c.width(tile) + len(self.lone)) for c in chunks)
        logits = self.q.new_empty(cells)
        self.band_buffer = self.q.new_empty(cells)
        if not self.lone:
            for chunk in chunks:
                self._chunk(chunk, logits, None)
            return
        span: list[Chunk] = []
        for chunk in chunks:
            span.append(chunk)
            top, bottom = span[0].row - first, chunk.row + chunk.rows - first
            if bottom - top >= _LONE_ROWS or chunk is chunks[-1]:
                lone = self._lone_logits(top, bottom)
                for each in span:
                    at = each.row - first - top
                    self._chunk(each, logits, lone[:, at : at + each.rows])
                self._add_lone_values(top, bottom, lone)
                span = []

    def _lone_logits(self, top: int, bottom: int) -> Tensor:
        """Return ``[lone, bottom - top]`` logits of the lone offsets."""
        q = self.q[top:bottom]
        logits = q.new_empty(len(self.lone), bottom - top)
        product = torch.empty_like(q)
        for at, r in enumerate(self.lone):
            keys = self._lone_keys(top, bottom, r)
            torch.mul(q, self.keys.window_k[keys], out=product)
            torch.sum(product, -1, out=logits[at])
            logits[at] += self.fence[keys]
        return logits

    def _add_lone_values(self, top: int, bottom: int, weights: Tensor) -> None:
        for at, r in enumerate(self.lone):
            values = self.keys.window_v[self._lone_keys(top, bottom, r)]
            self.out[top:bottom].addcmul_(values, weights[at, :, None])

    def _lone_keys(self, top: int, bottom: int, offset: int) -> slice:
        shift = self.keys.first - offset - self.keys.base
        return slice(top + shift, bottom + shift)

    def _chunk(self, chunk: Chunk, buffer: Tensor, lone: Tensor | None) -> None:
        """Attend one chunk; ``lone [L, rows]`` holds logits and is overwritten by weights."""
        tile, dim = self.schedule.tile, self.q.shape[1]
        rows, tiles, count = chunk.rows, chunk.rows // tile, chunk.columns
        width = chunk.width(tile) + len(self.lone)
        top = chunk.row - self.keys.first
        q = self.q[top : top + rows]
        logits = buffer[: rows * width].view(rows, width)
        tiled = logits.view(tiles, tile, width)
        if count:
            self._column_logits(chunk, q, logits[:, :count])
        windows = []
        at = count
        for band, (low, high) in enumerate(chunk.bands):
            size = tile + high - low - 1
            start = chunk.row - high + 1 - self.keys.base
            view = (tiles, size, dim), (tile * dim, dim, 1), start * dim
            part = tiled[:, :, at : at + size]
            keys = self.keys.window_k.as_strided(*view)
            self._band_logits(part, q.view(tiles, tile, dim), keys, band, start, chunk)
            windows.append((part, self.keys.window_v.as_strided(*view)))
            at += size
        if lone is not None:
            logits[:, at:] = lone.t()
        # Without a bias no row is empty: each sees its own token.
        if self.want_lse or self.keys.bias is not None:
            self.lse[top : top + rows] = softmax_with_lse_(logits)
        else:
            softmax_(logits)
        out = self.out[top : top + rows]
        tiled_out = out.view(tiles, tile, dim)
        if count:
            torch.mm(logits[:, :count], self.column_v[:count], out=out)
        else:
            out.zero_()
        for part, values in windows:
            tiled_out.baddbmm_(part, values)
        if lone is not None:
            lone.copy_(logits[:, at:].t())

    def _column_logits(self, chunk: Chunk, q: Tensor, logits: Tensor) -> None:
        count = chunk.columns
        torch.mm(q, self.column_k[:count].t(), out=logits)
        if self.column_bias is not None:
            logits += self.column_bias[:count]
        # Only columns inside the chunk can lie in a row's future.
        inside = int(torch.searchsorted(self.columns, chunk.row, right=True))
        if inside < count:
            row = torch.arange(chunk.row, chunk.row + chunk.rows)[:, None]
            logits[:, inside:].masked_fill_(self.columns[inside:count] > row, _OUT)

    def _band_logits(
        self, part: Tensor, q: Tensor, keys: Tensor, band: int, start: int, chunk: Chunk
    ) -> None:
        """Fill ``part [tiles, T, W]``; pairs outside the offsets or the sequence are masked."""
        tiles, tile, size = part.shape
        # Batched products are run as one only into contiguous memory.
        logits = self.band_buffer[: part.numel()].view(part.shape)
        torch.bmm(q, keys.transpose(1, 2), out=logits)
        mask = self.band_masks[band]
        torch.add(logits, mask[:, mask.shape[1] - size :], out=part)
        oldest = start + self.keys.base
        columns = int(torch.searchsorted(self.columns, oldest)) < chunk.columns
        if oldest < 0 or columns or self.keys.bias is not None:
            part += self.fence.as_strided((tiles, 1, size), (tile, 0, 1), start)
