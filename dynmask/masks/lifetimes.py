"""Masks in which a key, once evicted, never returns: an expiry for each key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmask.masks.padding import Padding
from dynmask.masks.rank import kth_smallest_of_runs

NEVER = torch.iinfo(torch.int32).max
"""Expiry of a key that no row evicts."""


@dataclass(frozen=True, eq=False)
class Lifetimes:
    """Key ``j`` is seen by the rows ``j <= i < expiry[b, g, j]``; the heads of a group share it.

    Covers every rule that scores keys without looking at the query: causal top-w of a score (DMA),
    sliding windows, sinks, padding, packed documents, and every policy that evicts for good.

    Args:
        expiry: ``[B, G, K]`` int32, key slots; ``expiry <= j`` hides key ``j`` from all rows,
            ``NEVER`` shows it to all later ones.

    Raises:
        ValueError: If ``expiry`` is not ``[B, G, K]`` int32.

    Source: DMA, arXiv 2508.02124; its score does not depend on the query, so the kept sets of
    successive rows differ by one key each way at most.
    """

    expiry: Tensor

    def __post_init__(self) -> None:
        if self.expiry.dim() != 3 or self.expiry.dtype != torch.int32:
            raise ValueError(
                f"expiry must be [B, G, K] int32, got {list(self.expiry.shape)} {self.expiry.dtype}"
            )

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
            ValueError: If ``window < 1`` or ``sinks < 0``.
        """
        if window < 1 or sinks < 0:
            raise ValueError(f"need window >= 1 and sinks >= 0, got {window} and {sinks}")
        slot = torch.arange(length, device=device)
        return cls(torch.where(slot < sinks, NEVER, slot + window).int()[None, None])

    @classmethod
    def above(cls, score: Tensor, threshold: float) -> Lifetimes:
        """Keep the keys whose score is at least ``threshold``, however many, for good.

        Args:
            score: ``[B, G, K]`` float.
            threshold: Compared in float32.
        """
        if score.dim() != 3:
            raise ValueError(f"score must be [B, G, K], got {list(score.shape)}")
        slot = torch.arange(score.shape[-1], device=score.device)
        return cls(torch.where(score.detach().float() >= threshold, NEVER, slot).int())

    @classmethod
    def top(
        cls,
        score: Tensor,
        *,
        keep: int,
        padding: Padding | None = None,
        documents: Tensor | None = None,
    ) -> Lifetimes:
        """Keep for every row the ``keep`` keys of highest score among those it may see.

        ``expiry_j = max(j, the keep-th smallest position among the keys that beat j)``, where a key
        beats another by a higher score, or by an equal score and an earlier position. With
        ``K <= keep`` nothing is evicted. Exact, in fp32: the same set as ``topk`` of each row.

        Args:
            score: ``[B, G, K]`` float, one a key and kv head. It is compared in float32.
            keep: ``w``, keys a row keeps; at least 1.
            padding: Which key slots hold real tokens; None means all.
            documents: ``[B, K]`` int, the document of each slot, never falling along K; a row sees
                its own document only. None means one document.

        Raises:
            ValueError: If a shape does not fit or ``keep < 1``.

        Source: selection of DMA, arXiv 2508.02124, section 3.2.
        """
        if score.dim() != 3:
            raise ValueError(f"score must be [B, G, K], got {list(score.shape)}")
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1")
        batch, groups, count = score.shape
        if documents is not None and documents.shape != (batch, count):
            raise ValueError(f"documents must be {[batch, count]}, got {list(documents.shape)}")
        score = score.detach().float()
        slot = torch.arange(count, device=score.device)
        # Stable sorts: by score, equal ones in order of position; then by document, padding last.
        order = score.argsort(dim=-1, descending=True, stable=True)
        segment = torch.zeros(batch, count, dtype=torch.int64, device=score.device)
        if documents is not None:
            segment = documents.long() - documents.amin(-1, keepdim=True).long()
        if padding is not None:
            real = (slot >= padding.start[:, None]) & (slot < padding.stop[:, None])
            segment = torch.where(real, segment, segment.amax(-1, keepdim=True) + 1)
        segment_BGK = segment[:, None].expand(batch, groups, count)
        sorted_segment, by_segment = segment_BGK.gather(-1, order).sort(dim=-1, stable=True)
        order = order.gather(-1, by_segment).flatten(0, 1)
        sorted_segment = sorted_segment.flatten(0, 1).contiguous()
        begin = torch.searchsorted(sorted_segment, sorted_segment)
        end_rank = torch.searchsorted(sorted_segment, sorted_segment, right=True)
        rank = slot.expand_as(order)
        evicted = kth_smallest_of_runs(order, begin, rank.contiguous(), keep - 1)
        expiry = torch.maximum(order, evicted.where(evicted < count, NEVER))
        if documents is not None:
            # Slots of a document are neighbours: its last one is the largest position in its run.
            size = end_rank - begin
            start = kth_smallest_of_runs(order, begin, end_rank, 0)
            expiry = torch.minimum(expiry, start + size)
        out = torch.empty_like(expiry).scatter_(-1, order, expiry).view(batch, groups, count)
        if padding is not None:
            out = torch.where(real[:, None], out.clamp_max(padding.stop[:, None, None]), slot)
        return cls(out.int())

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
        count = self.expiry.shape[-1]
        if k_len not in (None, count) or not 0 <= q_len <= count:
            raise ValueError(f"need q_len <= k_len = {count}, got {q_len} and {k_len}")
        slot = torch.arange(count, device=self.expiry.device)
        row = slot[count - q_len :, None]
        return (slot <= row) & (row < self.expiry[..., None, :])

    def density(self) -> Tensor:
        """Return ``[B, G]`` float64: visible pairs over causal pairs of ``K`` rows."""
        count = self.expiry.shape[-1]
        slot = torch.arange(count, device=self.expiry.device)
        seen = (self.expiry.clamp_max(count).long() - slot).clamp_min(0).sum(-1)
        return seen.double() / (count * (count + 1) / 2)
