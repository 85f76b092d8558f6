"""Lifetimes of every kind, and their definition as a matrix."""

import torch
from attention_cases import padding

from dynmask.masks import Lifetimes
from dynmask.masks.lifetimes import NEVER


def expiries(batch, groups, count, seed=0):
    """Any lifetimes: keys that no, few, many, or all later rows see; and rows without keys."""
    g = torch.Generator().manual_seed(seed)
    shape = (batch, groups, count)
    slot = torch.arange(count)
    kind = torch.randint(5, shape, generator=g)
    near = slot + torch.randint(0, 9, shape, generator=g)
    far = slot + torch.randint(0, count + 1, shape, generator=g)
    expiry = torch.stack([slot.expand(shape), slot + 1 - kind.gt(2).int(), near, far, far])
    expiry = expiry.gather(0, kind[None])[0]
    expiry = expiry.where(torch.rand(shape, generator=g) < 0.95, NEVER)
    # Nothing survives this slot, and the next ones are not seen: their rows are empty.
    gap = count // 3
    expiry = torch.where(slot < gap, expiry.clamp_max(gap), expiry)
    return Lifetimes(torch.where((slot >= gap) & (slot < gap + 2), slot, expiry).int())


def definition(mask, q_len, ratio):
    """``[B, H, Q, K]``: j <= i < expiry_j."""
    expiry = mask.expiry.repeat_interleave(ratio, 1)[:, :, None]
    key = torch.arange(expiry.shape[-1])
    row = key[len(key) - q_len :, None]
    return (key <= row) & (row < expiry)


MASKS = {
    "top": lambda n: Lifetimes.top(torch.randn(2, 2, n), keep=37),
    "rising": lambda n: Lifetimes.top(torch.arange(2.0 * 2 * n).view(2, 2, n), keep=37),
    "window": lambda n: Lifetimes.window(n, window=29, sinks=3),
    "causal": lambda n: Lifetimes(torch.full((1, 1, n), NEVER, dtype=torch.int32)),
    "nothing": lambda n: Lifetimes(torch.arange(n).int()[None, None]),
    "padded": lambda n: Lifetimes.top(
        torch.randn(2, 2, n), keep=37, padding=padding((7, n), (0, n - 50))
    ),
}
