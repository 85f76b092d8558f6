"""Order statistics of prefixes, for all prefixes at once: what an exact causal top-w needs."""

from __future__ import annotations

import torch
from torch import Tensor


def kth_smallest_of_runs(values: Tensor, first: Tensor, last: Tensor, k: int) -> Tensor:
    """Find the ``k``-th smallest value of many runs of one permutation.

    ``out[m, n] = sorted(values[m, first[m, n] : last[m, n]])[k]``, or ``N`` where the run has no
    more than ``k`` values. A wavelet matrix: one stable partition by each bit of the values, from
    the highest; every query follows its run down the levels. ``O(N log N)`` work in ``O(log N)``
    tensor operations, on any device and without a wait for it.

    Args:
        values: ``[M, N]`` int64, each row a permutation of ``0 .. N - 1``.
        first: ``[M, Q]`` int64, where each run begins.
        last: ``[M, Q]`` int64, one past where it ends; ``first <= last <= N``.
        k: Which value, from 0.

    Returns:
        ``[M, Q]`` int64.

    Source: Claude, Navarro, Ordóñez, "The wavelet matrix", Information Systems 47 (2015).
    """
    count = values.shape[-1]
    found = torch.zeros_like(first)
    left = torch.full_like(first, k)
    enough = last - first > k
    for bit in reversed(range(max(1, (count - 1).bit_length()))):
        ones = (values >> bit) & 1
        # zeros_before[n]: values with a 0 bit among the first n.
        zeros_before = torch.nn.functional.pad((1 - ones).cumsum(-1), (1, 0))
        zeros = zeros_before[:, -1:]
        first_zero = zeros_before.gather(-1, first)
        last_zero = zeros_before.gather(-1, last)
        inside = last_zero - first_zero
        up = left >= inside
        left = torch.where(up, left - inside, left)
        found |= up.long() << bit
        first = torch.where(up, zeros + first - first_zero, first_zero)
        last = torch.where(up, zeros + last - last_zero, last_zero)
        place = torch.where(
            ones == 1,
            zeros + torch.arange(count, device=values.device) - zeros_before[:, :-1],
            zeros_before[:, :-1],
        )
        values = torch.empty_like(values).scatter_(-1, place, values)
    return torch.where(enough, found, count)
