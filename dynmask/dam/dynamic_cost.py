"""What it would cost a tile of query rows to see a block of keys as one summary."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynmask.dam.dynamic_keys import Keys
from dynmask.dam.kernels import by_kernels
from dynmask.dam.landmarks import landmarks
from dynmask.ops.reference import accumulation_dtype

if TYPE_CHECKING:
    from dynmask.dam.dynamic import Dynamic

FIRST = 4
"""Landmarks of a block that the softmax's total counts one by one."""

# Of the exponent: squares of weights above it would leave float32.
_MOST = 57 * math.log(2)


def summary_costs(
    q: Tensor, keys: Keys, settings: Dynamic, far: Tensor, count: int, first: int, scale: float
) -> Tensor:
    """Return ``[B, G, T, count]``, the mean cost of each block's summary to each tile's rows.

    See `dynmask.dam.dynamic.Dynamic`. What is not far is 0, or not even written.

    Args:
        q: ``[B, H, n, D]``, rows from position ``first`` on.
        keys: Of the whole sequence.
        settings: How to choose.
        far: ``[T]`` int64, how many blocks are far from each tile, the first ones.
        count: The largest of ``far``.
        first: Position of the first row.
        scale: Factor of the logits.
    """
    groups = keys.k.shape[1]
    rows, places = representatives(q, settings, groups, len(far), first)
    run = by_kernels(q, "block_costs", marks=settings.landmarks, queries=rows.shape[3])
    return (run or block_costs)(
        rows,
        places,
        keys,
        far,
        count=count,
        first=first,
        last=first + q.shape[2],
        tile=settings.tile,
        every=settings.tile * q.shape[1] // groups,
        scale=scale,
    )


def block_costs(
    rows: Tensor,
    places: Tensor,
    keys: Keys,
    far: Tensor,
    *,
    count: int,
    first: int,
    last: int,
    tile: int,
    every: int,
    scale: float,
) -> Tensor:
    r"""Return ``[B, G, T, count]``, the cost of each block's summary to what stands for the rows.

    .. math:: r_J = \frac1M \sum_s m_s \sum_l n_l (P_{sl} - A_{sJ})^2, \qquad
        P_{sl} = e^{q_s \cdot k_l} / Z_s, \quad A_{sJ} = e^{q_s \cdot \bar k_J} / Z_s

    over the block's landmarks ``l``, each for ``n_l`` keys, and the representatives ``s``, each for
    ``m_s`` of ``M`` rows. ``Z`` adds up the keys that are not far, the first `FIRST` landmarks of
    each far block, and its other keys as so many times their mean: by Jensen's inequality no more
    than the softmax has, so that it makes no cost too small. What landmarks leave out may.

    Args:
        rows: ``[B, G, T, S, D]``, the last for ``every - S + 1`` rows.
        places: ``[B, G, T, S - 1]`` int64, where all but the last stand in their tiles, modulo
            ``tile``; the last stands at its tile's end.
        keys: Of the whole sequence.
        far: ``[T]`` int64, how many blocks are far from each tile, the first ones.
        count: The largest of ``far``.
        first: Position of the first row.
        last: Position behind the last row; keys from here on do not count.
        tile: Rows of a tile of one head.
        every: Rows of a tile, ``M``.
        scale: Factor of the logits.
    """
    rows = rows * scale
    some = rows.shape[3]
    is_far = (torch.arange(count, device=rows.device) < far[:, None])[:, None]
    position = _positions(places, len(far), first, last, tile)
    near = _near_mass(rows, keys, far, position, last)
    marks = keys.landmarks.shape[2]
    flat = rows.flatten(2, 3)
    summary = (flat @ keys.means(count).mT).to(near.dtype).view(*rows.shape[:4], count)
    of_marks = keys.landmarks[:, :, :, :count].flatten(2, 3)
    weights = (flat @ of_marks.mT).to(near.dtype).view(*rows.shape[:4], marks, count)
    few = min(FIRST, marks - 1)
    others = (keys.block * summary - weights[..., :few, :].sum(-2)) / (keys.block - few)
    others += math.log(keys.block - few)
    far_logits = torch.cat([weights[..., :few, :], others.unsqueeze(-2)], -2)
    far_logits.masked_fill_(~is_far[..., None, :], float("-inf"))
    total = torch.logaddexp(near, far_logits.flatten(-2).logsumexp(-1))[..., None]
    summary = summary.sub_(total).clamp_max_(_MOST).exp_().masked_fill_(~is_far, 0)
    weights = weights.sub_(total[..., None]).clamp_max_(_MOST).exp_()
    weights.masked_fill_(~is_far[..., None, :], 0)
    # The last landmark stands for the rest of the block.
    rest = keys.block - marks
    mass = weights.sum(-2).add_(weights[..., -1, :], alpha=rest)
    square = weights.square_().sum(-2).add_(weights[..., -1, :], alpha=rest)
    cost = square.addcmul_(summary, mass, value=-2)
    cost.addcmul_(summary, summary, value=keys.block)
    # And so does the last representative for the rest of the rows.
    cost = cost.sum(3).add_(cost[..., -1, :], alpha=every - some)
    return (cost / every).clamp_min_(0)


def representatives(
    q: Tensor, settings: Dynamic, groups: int, tiles: int, first: int
) -> tuple[Tensor, Tensor]:
    """Return ``[B, G, T, S, D]`` queries for each tile's, and the places of all but the last.

    They are landmarks of the rows of all query heads of a kv head, the last their mean; rows stand
    head after head. Rows that the first and the last tile lack count as copies of the nearest one
    that is there.
    """
    batch, heads, n, dim = q.shape
    tile, ratio = settings.tile, heads // groups
    begin = first // tile * tile
    before, behind = first - begin, begin + tiles * tile - first - n
    if before or behind:
        ends = q[:, :, :1].expand(-1, -1, before, -1), q[:, :, -1:].expand(-1, -1, behind, -1)
        q = torch.cat([ends[0], q, ends[1]], 2)
    of_tiles = q.view(batch, groups, ratio, tiles, tile, dim).transpose(2, 3)
    find = by_kernels(q, "landmarks", cells=ratio * tile * dim) or landmarks
    found, places = find(of_tiles, min(settings.queries, ratio * tile))
    return found.transpose(2, 3), places


def _positions(places: Tensor, tiles: int, first: int, last: int, tile: int) -> Tensor:
    """Return ``[B, G, T, S]``, where representatives stand; copies where their original does."""
    top = first // tile
    begin = torch.arange(top, top + tiles, device=places.device)[:, None] * tile
    end = (begin + tile - 1).expand(*places.shape[:3], 1)
    return torch.cat([begin + places % tile, end], -1).clamp_(first, last - 1)


def _near_mass(rows: Tensor, keys: Keys, far: Tensor, position: Tensor, last: int) -> Tensor:
    """Return ``[B, G, T, S]``, the log of the summed weights of the keys that are not far."""
    batch, groups, tiles, _, dim = rows.shape
    begin = far * keys.block
    # The last representative stands last.
    most = int((position[0, 0, :, -1] + 1 - begin).max())
    width = torch.arange(most, device=rows.device)
    place = begin[:, None] + width
    k = keys.tokens(0, last)[:, :, place.clamp_max(last - 1).flatten()]
    k = k.view(batch, groups, tiles, len(width), dim)
    found = (rows @ k.mT).to(accumulation_dtype(rows.dtype))
    hidden = place[:, None] > position[..., None]
    return found.masked_fill_(hidden, float("-inf")).logsumexp(-1)
