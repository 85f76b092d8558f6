"""Threshold amplified maps to true masks, and match the masks to columns and offsets."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Matched(NamedTuple):
    """What `match` found; all tensors are on the CPU.

    Attributes:
        columns: H sorted int64 tensors: key positions that every later row sees.
        offsets: H sorted int64 tensors: distances i - j that are seen wherever they fall; always
            holds 0, the own token.
        gamma_columns: `[H, L]` float32, similarity of each column's pattern to the mask.
        gamma_offsets: `[H, L]` float32, the same for each offset's diagonal.
    """

    columns: tuple[Tensor, ...]
    offsets: tuple[Tensor, ...]
    gamma_columns: Tensor
    gamma_offsets: Tensor


def true_mask(amplified: Tensor, tau: float) -> Tensor:
    """Return `M = [B >= tau]` for causal pairs, with every own token seen.

    Args:
        amplified: `[H, L, L]` amplified maps.
        tau: Threshold, in units of the amplified map.

    Returns:
        `[H, L, L]` bool.
    """
    mask = torch.tril(amplified >= tau)
    mask.diagonal(dim1=-2, dim2=-1).fill_(True)
    return mask


def match(mask: Tensor, mu: float, *, support: float = 0.25) -> Matched:
    """Find the columns and offsets that a causal mask is made of.

    DAM compares M with a pool of patterns, `gamma_k = sum(M * P_k) / sum(P_k)`, and keeps those
    with `gamma_k >= mu`. The pattern of column c is all rows `i >= c`, that of offset r all pairs
    `i - j = r`; so gamma is the mean of M down a column or along a diagonal, and no pool is made.

    Patterns near the far edge have few pairs, and few pairs cannot tell the two families apart. A
    head that sees its last w tokens fills every column with at most `w / mu` rows left; one that
    sees s first tokens fills every diagonal with at most `s / mu` pairs. Such a column or offset
    would be extended over the whole input, where nothing supports it. So a pattern must have at
    least `support * L` pairs (column c and offset k have L - c and L - k). With 0.25, windows and
    sinks of fewer than `mu * L / 4` tokens leave no false match; the last quarter of the positions
    and of the distances, which the captured corner still holds, cannot be matched. `support=0` is
    the paper's rule.

    Args:
        mask: `[H, L, L]` bool, causal, own tokens seen.
        mu: Smallest similarity of a match, in (0, 1].
        support: Smallest share of L that a pattern's pairs must number, in [0, 1).

    Returns:
        Columns, offsets and all similarities (also of patterns without support).

    Raises:
        ValueError: The mask is not a causal `[H, L, L]` bool tensor, or mu or support is out of
            range.
    """
    if mask.dtype != torch.bool or mask.ndim != 3 or mask.shape[-1] != mask.shape[-2]:
        raise ValueError(f"mask must be [H, L, L] bool, got {list(mask.shape)} {mask.dtype}")
    if not 0 < mu <= 1:
        raise ValueError(f"mu={mu} must be above 0 and at most 1")
    if not 0 <= support < 1:
        raise ValueError(f"support={support} must be at least 0 and below 1")
    if not mask.diagonal(dim1=-2, dim2=-1).all() or torch.triu(mask, 1).any():
        raise ValueError("mask must be causal with every own token seen; use true_mask")
    length = mask.shape[-1]
    pairs_L = length - torch.arange(length, dtype=torch.float64)
    # float64 on the CPU: 4 / 5 >= 0.8 must hold, and an accelerator may lack the type.
    gamma_columns = mask.sum(-2).cpu() / pairs_L
    gamma_offsets = _sum_diagonals(mask).cpu() / pairs_L
    supported_L = pairs_L >= max(1, math.ceil(support * length))
    return Matched(
        columns=_indices((gamma_columns >= mu) & supported_L),
        offsets=_indices((gamma_offsets >= mu) & supported_L),
        gamma_columns=gamma_columns.float(),
        gamma_offsets=gamma_offsets.float(),
    )


def _sum_diagonals(mask: Tensor) -> Tensor:
    """Sum a causal mask along each offset: `[H, L, L]` bool -> `[H, L]` int64, `[:, r]` offset r.

    In row-major order pair (i, i - r) is element i (L + 1) - r, so a view with stride L + 1 walks
    a diagonal. For i < r it runs into the end of row i - 1, above the diagonal, where a causal
    mask is False; the padding in front serves row 0.
    """
    heads, length, _ = mask.shape
    flat = functional.pad(mask.flatten(1), (length - 1, 0))
    # Element [h, i, t] of the view is pair (i, i - r) with r = L - 1 - t.
    skewed = flat.as_strided((heads, length, length), (flat.stride(0), length + 1, 1))
    return skewed.sum(1).flip(-1)


def _indices(hit_HL: Tensor) -> tuple[Tensor, ...]:
    return tuple(row.nonzero().flatten() for row in hit_HL)
