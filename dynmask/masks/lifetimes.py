"""Masks in which a key, once evicted, never returns: an expiry for each key."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from dynmask.masks.checks import require_integer, require_tensor
from dynmask.masks.documents import Documents
from dynmask.masks.padding import Padding
from dynmask.masks.rank import kth_smallest_of_runs

NEVER = torch.iinfo(torch.int32).max
"""Expiry of a key that no row evicts."""

# Looked up once: tracing cannot.
HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True, eq=False)
class Lifetimes:
    """Key ``j`` is seen by the rows ``j <= i < expiry[b, g, j]``; the heads of a group share it.

    Covers every rule that scores keys without looking at the query: causal top-w of a score (DMA),
    sliding windows, sinks, padding, packed documents, and every policy that evicts for good.
    Rows and keys count key slots, so padding moves them.

    Args:
        expiry: ``[B, G, K]`` int32, key slots; ``expiry <= j`` hides key ``j`` from all rows,
            ``NEVER`` (like anything from ``K`` on) shows it to all later ones. ``B`` and ``G`` may
            be 1: one expiry for all batch rows or kv heads.
        most: At least the number of keys that any row sees, if known. Not checked: kernels size
            their key lists by it.
        is_causal: Whether no key is hidden from any later row, as in `top` of few keys. Not
            checked: kernels that are told so do not read the expiries.

    Raises:
        ValueError: If ``expiry`` is not ``[B, G, K]`` int32 or negative somewhere, or ``most`` is
            negative.

    Source: DMA, arXiv 2508.02124; its score does not depend on the query, so the kept sets of
    successive rows differ by one key each way at most.
    """

    expiry: Tensor
    most: int | None = None
    is_causal: bool = False

    def __post_init__(self) -> None:
        require_tensor("expiry", self.expiry)
        if self.expiry.dim() != 3 or self.expiry.dtype != torch.int32:
            raise ValueError(
                f"expiry must be [B, G, K] int32, got {list(self.expiry.shape)} {self.expiry.dtype}"
            )
        if not torch.compiler.is_compiling() and bool((self.expiry < 0).any()):
            raise ValueError(
                "expiry must not be negative: give a key that no row sees its own slot"
            )
        if self.most is not None and self.most < 0:
            raise ValueError(f"most={self.most} must not be negative: pass None if it is unknown")

    @classmethod
    def _trusted(cls, expiry: Tensor, most: int | None, *, is_causal: bool = False) -> Lifetimes:
        """Return a mask known to be right: on a GPU every check would wait for the device."""
        if torch.compiler.is_compiling():
            return cls(expiry, most, is_causal)  # It skips the check too, and can be traced.
        made = object.__new__(cls)
        made.__dict__.update(expiry=expiry, most=most, is_causal=is_causal)
        return made

    @classmethod
    def window(
        cls, length: int, *, window: int, sinks: int = 0, device: torch.device | str = "cpu"
    ) -> Lifetimes:
        """Keep the ``window`` nearest keys, the own one included, and the first ``sinks`` keys.

        Args:
            length: ``K``, key slots.
            window: Nearest keys of each row; at least 1.
            sinks: First keys that every row sees.
            device: Where the tensor lives.

        Returns:
            ``expiry`` ``[1, 1, K]``, which broadcasts over rows and kv heads.

        Raises:
            ValueError: If ``length < 0``, ``window < 1`` or ``sinks < 0``, or one is no integer.
        """
        for name, value in (("length", length), ("window", window), ("sinks", sinks)):
            require_integer(name, value)
        if length < 0 or window < 1 or sinks < 0:
            raise ValueError(
                f"need length >= 0, window >= 1 and sinks >= 0, got {length}, {window} and {sinks}"
            )
        window = min(window, NEVER)
        slot = torch.arange(length, device=device)
        expiry = torch.where(slot < sinks, NEVER, (slot + window).clamp_max(NEVER))
        return cls._trusted(expiry.int()[None, None], window + sinks)

    @classmethod
    def above(cls, score: Tensor, threshold: float) -> Lifetimes:
        """Keep the keys whose score is at least ``threshold``, however many, for good.

        Args:
            score: ``[B, G, K]`` float; a NaN is below every threshold.
            threshold: Compared in float32.

        Raises:
            ValueError: If ``score`` is not ``[B, G, K]`` float.
        """
        _check_score(score)
        slot = torch.arange(score.shape[-1], device=score.device)
        expiry = torch.where(score.detach().float() >= threshold, NEVER, slot)
        return cls._trusted(expiry.int(), None)

    @classmethod
    def top(
        cls,
        score: Tensor,
        *,
        keep: int,
        offset: int = 0,
        padding: Padding | None = None,
        documents: Documents | Tensor | None = None,
    ) -> Lifetimes:
        """Keep for every row the ``keep`` keys of highest score among those it may see.

        ``expiry_j = max(j, the keep-th smallest position among the keys that beat j)``, where a key
        beats another by a higher score, or by an equal score and an earlier position. With
        ``K <= keep`` nothing is evicted. Exact, in fp32: the same set as ``topk`` of each row.

        Scores need not be finite: +inf ranks first, NaN counts as -inf, and a key of -inf is kept
        where fewer than ``keep`` others are there. -0.0 equals 0.0.

        Decode and chunked prefill need only the keys still alive. What a row keeps depends on the
        keys that the row before kept and on its own, so with the cache cut to the kept keys, in
        order of position, ``top(score of the kept and the new keys, keep=keep)`` shows the new rows
        the same keys as ``top`` over everything. The keys to carry on are those with
        ``expiry >= K``.

        With an ``offset`` only the rows ``i >= offset`` are right: each sees the same keys as with
        ``offset=0``, ``j <= i < expiry_j``. What earlier rows see is not specified, but never more
        than ``keep`` keys: those that no row from ``offset`` on sees may get any expiry up to
        ``max(j, offset)``. On a GPU decode (``offset = K - 1``) and chunked prefill over a cache
        (``offset`` the first new slot) then cost what their rows need; the CPU does the whole work.

        Args:
            score: ``[B, G, K]`` float, one a key and kv head. It is compared in float32.
            keep: ``w``, keys a row keeps; at least 1.
            offset: First row that matters, a key slot from 0 to ``K``. With ``K - Q`` the mask is
                right for ``Q`` query rows, the last ones.
            padding: Which key slots hold real tokens; None means all.
            documents: The document of each slot; a row sees, and selects among, its own document
                only. A tensor means ``Documents(tensor)``, None one document.

        Returns:
            The mask ``[B, G, K]``, with ``most=keep``. ``expiry`` may be an expanded tensor.

        Raises:
            ValueError: If a shape does not fit, ``keep < 1``, or not ``0 <= offset <= K``.

        Source: selection of DMA, arXiv 2508.02124, section 3.2.
        """
        _check_score(score)
        require_integer("keep", keep)
        require_integer("offset", offset)
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1")
        if documents is not None and not isinstance(documents, Documents):
            documents = Documents(documents)
        if padding is not None and not isinstance(padding, Padding):
            raise ValueError(
                f"padding must be a Padding or None, got {type(padding).__name__}: "
                "use Padding.from_mask(attention_mask)"
            )
        batch, groups, count = score.shape
        if not 0 <= offset <= count:
            raise ValueError(
                f"offset={offset} must be from 0 to K={count}: pass K - Q for the last Q rows"
            )
        score = score.detach()
        if padding is not None:
            padding = _fitting_padding(padding, score, batches=(1, batch))
        if documents is not None:
            documents = _fitting_documents(documents, score, batches=(1, batch))
        if count <= keep:
            expiry = _never(count, score.device).expand(batch, groups, count)
        else:
            expiry = _expiry_of_top(score, keep, _segments(score, padding, documents), offset)
        # The selection knows segments by order alone: their ends are cut here.
        if documents is not None:
            expiry = torch.minimum(expiry, documents.ends()[:, None])
        if padding is not None:
            expiry = _hide_padding(expiry, padding)
        everything = count <= keep and documents is None and padding is None
        return cls._trusted(expiry, keep, is_causal=everything)

    @property
    def device(self) -> torch.device:
        """Where the expiries live."""
        return self.expiry.device

    def to(self, device: torch.device | str) -> Lifetimes:
        """Return the same mask on ``device``."""
        if torch.device(device) == self.device:
            return self
        return self._trusted(self.expiry.to(device), self.most, is_causal=self.is_causal)

    def prefix(self, k_len: int) -> Lifetimes:
        """Return the mask of the first ``k_len`` slots: their rows see the same keys."""
        return self._trusted(self.expiry[..., :k_len], self.most, is_causal=self.is_causal)

    def __and__(self, other: Padding | Documents) -> Lifetimes:
        """Return the mask that shows what both show: rows see real tokens, or their document, only.

        Folded into ``expiry``. Keys are hidden after they were selected: a row of
        ``top(score, keep=w) & documents`` may see fewer than ``w`` keys of its document, while
        ``top(score, keep=w, documents=documents)`` selects within it.

        Raises:
            ValueError: If batch sizes or lengths differ.
        """
        batch = self.expiry.shape[0]
        if isinstance(other, Padding):
            batches = (1, batch) if batch > 1 else (len(other.start),)
            padding = _fitting_padding(other, self.expiry, batches)
            return self._trusted(_hide_padding(self.expiry, padding), self.most)
        if isinstance(other, Documents):
            batches = (1, batch) if batch > 1 else (len(other.ids),)
            ends = _fitting_documents(other, self.expiry, batches).ends()
            return self._trusted(torch.minimum(self.expiry, ends[:, None]), self.most)
        return NotImplemented

    def dense(self, q_len: int, k_len: int | None = None) -> Tensor:
        """Return the mask as a matrix, for tests and pictures.

        Args:
            q_len: Query rows ``Q``; row ``i`` stands at key slot ``K - Q + i``.
            k_len: Must be ``K`` if given.

        Returns:
            ``[B, G, Q, K]`` bool.

        Raises:
            ValueError: If ``k_len`` is not ``K``, or not ``0 <= q_len <= K``.
        """
        count = self._checked_length(q_len, k_len)
        return self.slots(count - q_len, count, count)

    def slots(self, first: int, last: int, k_len: int) -> Tensor:
        """Return ``[B, G, last - first, k_len]`` bool: rows at key slots first to last - 1."""
        row = torch.arange(first, last, device=self.device)[:, None]
        key = torch.arange(k_len, device=self.device)
        return (key <= row) & (row < self.expiry[..., None, :k_len])

    def visible_pairs(self, q_len: int, k_len: int | None = None) -> Tensor:
        """Count the (query, key) pairs that the mask shows, without building it.

        Args:
            q_len: Query rows ``Q``, the last ones of the sequence.
            k_len: Must be ``K`` if given.

        Returns:
            ``[B, G]`` int64.

        Raises:
            ValueError: If ``k_len`` is not ``K``, or not ``0 <= q_len <= K``.
        """
        count = self._checked_length(q_len, k_len)
        slot = torch.arange(count, device=self.device)
        birth = slot.clamp_min(count - q_len)
        return (self.expiry.long().clamp_max(count) - birth).clamp_min(0).sum(-1)

    def density(self) -> Tensor:
        """Return ``[B, G]`` float64: visible pairs over causal pairs of ``K`` rows."""
        count = self.expiry.shape[-1]
        return self.visible_pairs(count).double() / (count * (count + 1) / 2)

    def _checked_length(self, q_len: int, k_len: int | None) -> int:
        """Return ``K``, if the lengths fit."""
        count = self.expiry.shape[-1]
        if k_len not in (None, count) or not 0 <= q_len <= count:
            raise ValueError(f"need q_len <= k_len = {count}, got {q_len} and {k_len}")
        return count


def _check_score(score: Tensor) -> None:
    require_tensor("score", score)
    if score.dim() != 3 or not score.is_floating_point():
        raise ValueError(f"score must be [B, G, K] float, got {list(score.shape)} {score.dtype}")


def _fitting_padding(padding: Padding, of: Tensor, batches: tuple[int, ...]) -> Padding:
    """Return the padding on the device of ``of [B, G, K]``, to which it must fit."""
    rows = len(padding.start)
    if rows not in batches:
        raise ValueError(f"padding has {rows} rows but the batch {of.shape[0]}")
    if padding.end > of.shape[2]:
        raise ValueError(f"padding ends at slot {padding.end} but the mask has {of.shape[2]} slots")
    return padding if padding.start.device == of.device else padding.to(of.device)


def _fitting_documents(documents: Documents, of: Tensor, batches: tuple[int, ...]) -> Documents:
    """Return the documents on the device of ``of [B, G, K]``, to which they must fit."""
    rows, count = documents.ids.shape
    if rows not in batches or count != of.shape[2]:
        raise ValueError(
            f"documents are [{rows}, {count}] but the batch and its slots "
            f"{[of.shape[0], of.shape[2]]}"
        )
    return documents.to(of.device)


def _hide_padding(expiry: Tensor, padding: Padding) -> Tensor:
    """Return ``[B, G, K]``: padding slots expire at once, real ones where the padding begins."""
    slot = torch.arange(expiry.shape[-1], dtype=torch.int32, device=expiry.device)
    start, stop = padding.start[:, None, None], padding.stop[:, None, None].int()
    return torch.where((slot >= start) & (slot < stop), torch.minimum(expiry, stop), slot)


def _segments(score: Tensor, padding: Padding | None, documents: Documents | None) -> Tensor | None:
    """Return ``[B, K]`` int32, never falling: left padding, each document, right padding."""
    if padding is None and documents is None:
        return None
    batch, _, count = score.shape
    segment = torch.zeros(1, count, dtype=torch.int32, device=score.device)
    if documents is not None:
        segment = documents.ordinals()
    if padding is not None:
        slot = torch.arange(count, device=score.device)
        segment = torch.where(slot >= padding.stop[:, None], count + 1, segment + 1)
        segment = segment.masked_fill(slot < padding.start[:, None], 0).int()
    return segment.expand(batch, count).contiguous()


def _never(count: int, device: torch.device) -> Tensor:
    """Return `NEVER` as ``[1, 1, K]`` int32, on a GPU without a launch after the first times."""
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if captured or torch.compiler.is_compiling():
        # A graph fills what it makes when it runs, not now: it must not be kept.
        return _new_never(count, device)
    return _kept_never(1 << max(count - 1, 0).bit_length(), device)[..., :count]


@cache
def _kept_never(count: int, device: torch.device) -> Tensor:
    # Made in inference mode, it could never be saved for a gradient.
    with torch.inference_mode(False):
        return _new_never(count, device)


def _new_never(count: int, device: torch.device) -> Tensor:
    return torch.full((1, 1, count), NEVER, dtype=torch.int32, device=device)


def _expiry_of_top(score: Tensor, keep: int, segment: Tensor | None, offset: int) -> Tensor:
    """Return when each key is evicted, a key of a later segment beating all of earlier ones.

    Args:
        score: ``[B, G, K]`` float, compared in float32.
        keep: Keys a row keeps.
        segment: ``[B, K]`` int32, never falling along K, or None.
        offset: First row that matters; the torch path does not use it.

    Returns:
        ``[B, G, K]`` int32; right up to the segment's end, where the caller cuts it.
    """
    if score.is_cuda and HAS_TRITON:
        from dynmask.masks.triton.select import expiry_of_top

        return expiry_of_top(score, keep, segment, offset)
    score = score.float()
    score = score.masked_fill(score.isnan(), -torch.inf).masked_fill(score == 0, 0.0)
    count = score.shape[-1]
    # Stable sorts: by score, equal ones in order of position; then the latest segment first.
    order = score.argsort(dim=-1, descending=True, stable=True)
    if segment is not None:
        sorted_segment = segment[:, None].expand(score.shape).gather(-1, order)
        by_segment = sorted_segment.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, by_segment)
    order = order.flatten(0, 1)
    rank = torch.arange(count, device=score.device).expand_as(order).contiguous()
    evicted = kth_smallest_of_runs(order, torch.zeros_like(rank), rank, keep - 1)
    expiry = torch.maximum(order, evicted.where(evicted < count, NEVER)).int()
    return torch.empty_like(expiry).scatter_(-1, order, expiry).view(score.shape)
