"""Which tokens of a full cache to give up: those that the last rows hardly look at."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmask.ops.reference import accumulation_dtype

SINKS = 4
"""First tokens that always stay: attention rests on them (StreamingLLM, arXiv 2309.17453)."""

RECENT = 64
"""Last tokens that always stay, and rows that say what is looked at."""

_AROUND = 16  # A fact is several tokens: those on either side of what is looked at come next.


def importance(q: Tensor, k: Tensor, *, rows: Tensor, slots: Tensor, scale: float) -> Tensor:
    r"""Say what the attention of the last rows would lose with a token.

    .. math:: r_j = \max_{g} \max_{|t - j| \le 16} \operatorname{mean}_{rows, heads\ of\ g} P_{it}^2

    The largest over the kv heads g: a layer keeps what any of its heads looks at, in all of them. A
    head may need a token only later that another one has found already, as heads that copy a number
    look at its last digits when the first are written. The first `SINKS` and the last `RECENT`
    tokens count as infinitely important, empty slots as -1.

    Args:
        q: ``[B, H, n, D]``, the queries of the last ``n <= RECENT`` tokens, which own the last
            slots.
        k: ``[B, G, S, D]``, in the order of their tokens.
        rows: ``[B, n]`` bool, False for queries of padding, which come first.
        slots: ``[B, S]`` bool, False for empty slots, which come first.
        scale: Factor of the logits.

    Returns:
        ``[B, S]`` float32. Of heads that are split over processes, the largest of theirs is that
        of all.

    Source: keys chosen by the attention of the last rows, with their neighbours, SnapKV (arXiv
    2404.14469), which takes the mean of ``P`` and two neighbours, and each head its own.
    """
    batch, heads, n, _ = q.shape
    groups, size = k.shape[1:3]
    slot = torch.arange(size, device=q.device)
    hidden = (slot > slot[size - n :, None]) | ~slots[:, None]
    padding = ~rows[:, None, :, None]
    largest = torch.zeros(batch, size, device=q.device)
    for g in range(groups):  # One at a time: over a long prompt the logits of all would be large.
        of_group = q[:, g * (heads // groups) : (g + 1) * (heads // groups)]
        logits = (of_group @ k[:, g, None].mT).to(accumulation_dtype(q.dtype)).mul_(scale)
        weights = logits.masked_fill_(hidden[:, None], float("-inf")).softmax(-1)
        # A row of padding may see nothing.
        square = weights.square_().masked_fill_(padding, 0).sum((1, 2))
        largest = torch.maximum(largest, square.float())
    largest /= (rows.sum(-1) * (heads // groups)).clamp_min(1)[:, None]
    width = 2 * _AROUND + 1
    found = torch.nn.functional.max_pool1d(largest, width, stride=1, padding=_AROUND)
    begin = size - slots.sum(-1)[:, None]
    stay = ((slot >= begin) & (slot < begin + SINKS)) | (slot >= size - RECENT)
    return found.masked_fill(stay, float("inf")).masked_fill(~slots, -1)


def kept(score: Tensor, count: int) -> Tensor:
    """Return ``[B, count]``, the slots of largest ``score [B, S]`` in ascending order.

    Neighbours share scores: of equal ones the earlier stay.
    """
    order = score.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(-1).values


def last_real(q: Tensor, real: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the last ``count`` real rows of each batch row, in order and at the end.

    Args:
        q: ``[B, H, n, D]``.
        real: ``[B, n]`` bool.
        count: How many; fewer if there are fewer rows.

    Returns:
        ``[B, H, min(n, count), D]``, and ``[B, min(n, count)]``: which of these are real.
    """
    order = real.sort(dim=-1, stable=True).indices[:, -count:]
    index = order[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    return q.gather(2, index), real.gather(1, order)
