"""Whether a result is right, before it is timed: independent computations on sampled rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dynmask.bench.inputs import Inputs
from dynmask.masks import Lifetimes

ROWS = 64
"""Query rows that a gate looks at."""
OURS, OTHERS = 2.0, 8.0
"""Multiples of eager attention's error that a kernel of ours, and a baseline, may have.

The contract for the one; for the other enough to tell a wrong result from a coarse one.
"""
_WINDOW = 128


class GateError(Exception):
    """A result is wrong; the message says which and by how much."""


def sample_rows(length: int, *, keep: int, q_len: int | None = None) -> list[int]:
    """Return about `ROWS` key slots of query rows across the sequence, ascending.

    Always the first and the last ones, those around ``keep``, where eviction begins, and random
    ones; all rows if there are few.

    Args:
        length: ``K``.
        keep: ``w``.
        q_len: Query rows, the last of the slots; None means all.
    """
    first = length - (length if q_len is None else q_len)
    if length - first <= ROWS:
        return list(range(first, length))
    edges = {first, first + 1, keep - 1, keep, keep + 1, length - 2, length - 1}
    random = torch.randperm(length - first, generator=torch.Generator().manual_seed(length))
    picked = edges | {first + int(row) for row in random[: ROWS - len(edges)]}
    return sorted(row for row in picked if first <= row < length)


def top_set(score: Tensor, row: int, keep: int) -> Tensor:
    """Return ``[B, G, min(keep, row + 1)]``: the slots that a row keeps, ascending.

    By a stable sort of the row's own prefix, so that of equal scores the earlier key wins.
    """
    order = score[..., : row + 1].sort(dim=-1, descending=True, stable=True).indices
    return order[..., :keep].sort(dim=-1).values


def check_selection(mask: Lifetimes, score: Tensor, keep: int, rows: Sequence[int]) -> None:
    """Compare the mask's sampled rows with the sorted prefixes of the score.

    Raises:
        GateError: If a row keeps another set.
    """
    if mask.expiry.shape != score.shape:
        raise GateError(f"selection: expiry is {list(mask.expiry.shape)} for {list(score.shape)}")
    for row in rows:
        kept = mask.expiry[..., : row + 1] > row
        expected = torch.zeros_like(kept).scatter_(-1, top_set(score, row, keep), True)
        wrong = int((kept != expected).sum())
        if wrong:
            raise GateError(f"selection: row {row} differs from top-{keep} at {wrong} keys")


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attend in the inputs' own dtype, as eager PyTorch models do; exact to rounding in float64.

    Args:
        q: ``[B, H, R, D]``.
        k: ``[B, G, N, D]``.
        v: ``[B, G, N, D]``.
        bias: ``[B, G, N]``.
        seen: ``[B, G, R, N]`` bool, or what broadcasts to it.
        scale: Factor of the logits.

    Returns:
        ``[B, H, R, D]``.
    """
    batch, heads, rows, dim = q.shape
    groups = k.shape[1]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = (q.reshape(batch, groups, -1, dim) @ k.transpose(2, 3)) * scale
    logits = logits.view(batch, groups, -1, rows, k.shape[2]) + bias.to(q.dtype)[:, :, None, None]
    logits = logits.masked_fill(~seen[:, :, None], float("-inf"))
    weights = logits.to(work).softmax(-1).to(q.dtype)
    return (weights.flatten(2, 3) @ v).view(batch, heads, rows, dim)


def check_rows(
    out: Tensor,
    inputs: Inputs,
    score: Tensor,
    bias: Tensor,
    keep: int,
    rows: Sequence[int],
    *,
    allowed: float = OURS,
) -> float:
    """Compare sampled rows of an output with exact attention to the top keys of the score.

    Each row's kept keys are found by `top_set`, gathered, and attended to in float64; no part of
    the engine is used. A row may err at most ``allowed`` times as much as eager attention in the
    inputs' dtype.

    Args:
        out: ``[B, H, Q, D]``.
        inputs: What was attended to.
        score: ``[B, G, K]``, what selects.
        bias: ``[B, G, K]``, what is added.
        keep: Keys a row keeps.
        rows: Key slots of the rows.
        allowed: `OURS` or `OTHERS`.

    Returns:
        The largest error of a row over eager's.

    Raises:
        GateError: If a row is wrong.
    """
    return max(
        _check_row(out, inputs, top_set(score, row, keep), bias, row, "attention", allowed)
        for row in rows
    )


def check_dense(out: Tensor, inputs: Inputs, rows: Sequence[int]) -> float:
    """Compare sampled rows of dense causal attention; see `check_rows`."""
    batch, groups, length, _ = inputs.k.shape
    bias = torch.zeros(batch, groups, length, device=out.device)
    worst = 0.0
    for row in rows:
        prefix = torch.arange(row + 1, device=out.device).expand(batch, groups, -1)
        worst = max(worst, _check_row(out, inputs, prefix, bias, row, "dense attention", OTHERS))
    return worst


def _check_row(
    out: Tensor,
    inputs: Inputs,
    slots: Tensor,
    bias: Tensor,
    row: int,
    what: str,
    allowed: float,
) -> float:
    q, k, v = inputs
    place = row - (k.shape[2] - q.shape[2])
    dim = q.shape[3]
    worst = 0.0
    share = q.shape[1] // k.shape[1]
    for group in range(k.shape[1]):  # one by one: a dense row of 512K keys in float64 is large
        heads = slice(group * share, (group + 1) * share)
        of_group = slots[:, group : group + 1]
        index = of_group[..., None].expand(-1, -1, -1, dim)
        parts = (
            q[:, heads, place : place + 1],
            k[:, group : group + 1].gather(2, index),
            v[:, group : group + 1].gather(2, index),
            bias[:, group : group + 1].gather(2, of_group),
        )
        seen = torch.ones(1, 1, 1, of_group.shape[-1], dtype=torch.bool, device=q.device)
        scale = 1 / math.sqrt(dim)
        wide = [part.double() for part in parts]
        exact = plain(wide[0], wide[1], wide[2], wide[3], seen, scale)
        eager = plain(*parts, seen, scale)
        ours = out[:, heads, place : place + 1]
        worst = max(worst, compare(f"{what}: row {row}", ours, exact, eager, allowed=allowed))
    return worst


def compare(
    what: str, ours: Tensor, exact: Tensor, eager: Tensor, *, allowed: float = OURS
) -> float:
    """Hold an error against that of eager attention in the same dtype.

    Both the largest and the root mean square error may be at most ``allowed`` times eager's, plus
    a few roundings in float32.

    Returns:
        Our largest error over what eager's is, roundings added.

    Raises:
        GateError: If the error is larger, or not a number.
    """
    if ours.shape != exact.shape:
        raise GateError(f"{what} has shape {list(ours.shape)} instead of {list(exact.shape)}")
    if exact.numel() == 0:
        return 0.0
    slack = 8 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    worst = 0.0
    for name, size in (("largest", _largest), ("mean square", _root_mean_square)):
        error, usual = size(ours.double() - exact), size(eager.double() - exact) + slack
        if not error <= allowed * usual:
            raise GateError(
                f"{what}: {name} error {error:.2e}, over {allowed:g} times eager's {usual:.2e}"
            )
        if name == "largest" and usual > 0:
            worst = error / usual
    return worst


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def _root_mean_square(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


def check_whole_backward(
    grads: Sequence[Tensor], inputs: Inputs, bias: Tensor, seen: Tensor, grad_out: Tensor
) -> float:
    """Compare all gradients with autograd of the whole attention matrix, for a short sequence.

    Args:
        grads: Of q, k, v and bias.
        inputs: q, k and v.
        bias: ``[B, G, K]``.
        seen: ``[B, G, Q, K]`` bool, made independently of the engine.
        grad_out: ``[B, H, Q, D]``.

    Raises:
        GateError: If a gradient is wrong.
    """
    parts = (*inputs, bias)
    exact = _gradients(tuple(part.double() for part in parts), seen, grad_out)
    eager = _gradients(parts, seen, grad_out)
    return max(
        compare(f"backward at {bias.shape[-1]} tokens: d{name}", *three)
        for name, *three in zip(("q", "k", "v", "bias"), grads, exact, eager, strict=True)
    )


def seen_rows(score: Tensor, keep: int) -> Tensor:
    """Return ``[B, G, K, K]`` bool: `top_set` of every row, as a matrix."""
    length = score.shape[-1]
    seen = torch.zeros(*score.shape, length, dtype=torch.bool, device=score.device)
    for row in range(length):
        seen[:, :, row].scatter_(-1, top_set(score, row, keep), True)
    return seen


def check_window_backward(
    grads: Sequence[Tensor], inputs: Inputs, bias: Tensor, mask: Lifetimes, grad_out: Tensor
) -> float:
    """Compare gradients at full length, for the rows and keys of three windows.

    In a window of 128 rows the exact gradient of q takes the keys alive there. So does that of
    every key which is seen by these rows alone; other keys are left out. The mask must have passed
    `check_selection`.

    Args:
        grads: Of q, k, v and bias.
        inputs: q, k and v.
        bias: ``[B, G, K]``.
        mask: Lifetimes.
        grad_out: ``[B, H, K, D]``.

    Raises:
        GateError: If a gradient is wrong.
    """
    q, k, v = inputs
    length, share = k.shape[2], q.shape[1] // k.shape[1]
    worst = 0.0
    for first in sorted({0, (length - _WINDOW) // 2, length - _WINDOW}):
        begin, end = max(first, 0), max(first, 0) + min(_WINDOW, length)
        row = torch.arange(begin, end, device=q.device)
        for b in range(k.shape[0]):
            for g in range(k.shape[1]):
                life = mask.expiry[b, g, :end].clamp_max(length)
                slot = torch.arange(end, device=q.device)
                alive = ((life > begin) & (life > slot)).nonzero().squeeze(-1)
                heads = slice(g * share, (g + 1) * share)
                parts = (
                    q[b : b + 1, heads, begin:end],
                    k[b : b + 1, g : g + 1, alive],
                    v[b : b + 1, g : g + 1, alive],
                    bias[b : b + 1, g : g + 1, alive],
                )
                seen = (alive <= row[:, None]) & (row[:, None] < life[alive])
                of_window = grad_out[b : b + 1, heads, begin:end]
                exact = _gradients(tuple(p.double() for p in parts), seen[None, None], of_window)
                eager = _gradients(parts, seen[None, None], of_window)
                complete = (alive >= begin) & (life[alive] <= end)
                keys = alive[complete]
                ours = [grads[0][b : b + 1, heads, begin:end]]
                ours += [grad[b : b + 1, g : g + 1, keys] for grad in grads[1:]]
                exact = [exact[0], *(grad[:, :, complete] for grad in exact[1:])]
                eager = [eager[0], *(grad[:, :, complete] for grad in eager[1:])]
                for name, *three in zip(("q", "k", "v", "bias"), ours, exact, eager, strict=True):
                    what = f"backward: d{name} of rows {begin} to {end - 1}"
                    worst = max(worst, compare(what, *three))
    return worst


def _gradients(parts: tuple[Tensor, ...], seen: Tensor, grad_out: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        q, k, v, bias = leaves = [part.detach().requires_grad_() for part in parts]
        out = plain(q, k, v, bias, seen, 1 / math.sqrt(q.shape[-1]))
        return list(torch.autograd.grad(out, leaves, grad_out.to(out.dtype)))
