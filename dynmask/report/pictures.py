"""A layer's maps and masks as one small PNG: the page shows it, and cuts single heads from it.

Every picture is square, rows are queries and columns are keys, and the future (j > i) is
transparent, so that the page's own background shows through in light and in dark.
"""

from __future__ import annotations

import base64
import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch.nn import functional

from dynmask.dam.layer import PREVIEW_SIZE

if TYPE_CHECKING:
    from dynmask.dam import MaskPlan

#: What a sheet shows of each head, one below the other.
KINDS = ("mean map", "true mask", "stripes", "extended stripes")
#: The extended stripes are drawn over this many capture lengths.
EXTENSION = 4
#: Heads beside each other in a sheet, and the empty pixels between two pictures.
ACROSS, GAP = 8, 4
#: Most pixels of all pictures of one kind in a page: what bounds the page's size.
MOST_PIXELS = 2**22
SMALLEST_SIDE = 16

MAP_COLOURS = "viridis"
#: Range of a map's colour scale, as a factor of its largest value.
MAP_RANGE = 1e-4
# Palette: the future, the colours of maps, and from _HIDDEN on the shades of masks. Few of each,
# since the page's size grows with their logarithm.
_MAP_LEVELS, _MASK_LEVELS = 63, 15
_HIDDEN = 1 + _MAP_LEVELS
_TINY = float(np.finfo(np.float32).tiny)

Floats = NDArray[np.floating[Any]]
Levels = NDArray[np.uint8]


def picture_side(heads: int, length: int) -> int:
    """Return the side of a head's picture in pixels, so small that all of them stay in bounds.

    Args:
        heads: Number of heads in the page, over all layers and plans.
        length: Capture length of the plan; a picture is never larger.

    Returns:
        At most `PREVIEW_SIZE`; `heads * side^2` is at most `MOST_PIXELS` up to 16,384 heads.
    """
    side = math.isqrt(MOST_PIXELS // heads)
    return min(max(side, SMALLEST_SIDE), PREVIEW_SIZE, length)


def sheet(plan: MaskPlan, layer: int, side: int) -> str:
    """Draw all heads of a layer.

    Head h stands in column `h % ACROSS`; each row of heads takes one row of pictures for each of
    `KINDS`. Pictures are `side + GAP` pixels apart.

    Args:
        plan: The plan.
        layer: The layer's index.
        side: Side of a picture, as `picture_side` gives it.

    Returns:
        A ``data:image/png`` URI.
    """
    part, length = plan.layers[layer], plan.settings.capture_length
    kinds = [
        map_levels(functional.adaptive_max_pool2d(part.previews[0].float(), side).numpy()),
        mask_levels(mask_share(part.corner.numpy(), side)),
    ]
    for reach in (length, EXTENSION * length):
        shares = [
            stripe_share(columns.numpy(), offsets.numpy(), reach, side)
            for columns, offsets in zip(part.columns, part.offsets, strict=True)
        ]
        kinds.append(mask_levels(np.stack(shares)))
    pitch, across = side + GAP, min(part.heads, ACROSS)
    rows = -(-part.heads // ACROSS)
    image = np.zeros((rows * len(KINDS) * pitch - GAP, across * pitch - GAP), np.uint8)
    for head in range(part.heads):
        row, left = len(KINDS) * (head // ACROSS), head % ACROSS * pitch
        for kind, levels in enumerate(kinds):
            top = (row + kind) * pitch
            image[top : top + side, left : left + side] = np.tril(levels[head])
    return _png(image)


def map_levels(maps: Floats) -> Levels:
    """Return the palette entries of maps, by `log10` over `MAP_RANGE * max .. max` of each.

    Args:
        maps: `[H, P, P]`; values above the diagonal do not count.
    """
    peak = np.tril(maps).max((1, 2), keepdims=True)
    share = np.clip(maps / np.maximum(peak, _TINY), MAP_RANGE, 1)
    shade = 1 - np.log10(share) / np.log10(MAP_RANGE)
    return (1 + np.rint(shade * (_MAP_LEVELS - 1))).astype(np.uint8)


def mask_levels(share: Floats) -> Levels:
    """Return the palette entries of shares of visible pairs.

    The shade grows with the share's square root, so that a line thinner than a pixel is seen; only
    a share of 0 is drawn as hidden.
    """
    return (_HIDDEN + np.ceil(np.sqrt(share) * _MASK_LEVELS)).astype(np.uint8)


def mask_share(masks: NDArray[np.bool_], side: int) -> Floats:
    """Return the share of the causal pairs in each cell that is visible.

    Args:
        masks: `[H, L, L]` causal.
        side: P, at most L; cell i has the positions from `i * L // P` to before `(i + 1) * L // P`.

    Returns:
        `[H, P, P]`, 0 in cells without causal pairs.
    """
    edges = _edges(masks.shape[-1], side)
    rows = np.add.reduceat(masks, edges[:-1], axis=1, dtype=np.int32)
    visible = np.add.reduceat(rows, edges[:-1], axis=2)
    return visible / np.maximum(_by_cell(_distances(edges), edges), 1)


def stripe_share(
    columns: NDArray[np.int64], offsets: NDArray[np.int64], length: int, side: int
) -> Floats:
    """Return the share of the causal pairs in each cell that columns and offsets show, exactly.

    No mask is built. With `D(e, j) = max(e - j, 0)`, the rows before e that may see key j, e's
    number of pairs is D where j is a column, and else the number of offsets below D; a cell's is
    the difference between the ends of its rows.

    Args:
        columns: Positions that every later row sees; those from `length` on do not count.
        offsets: Distances that every row sees.
        length: Tokens.
        side: P, as in `mask_share`.

    Returns:
        `[P, P]`.
    """
    edges = _edges(length, side)
    distances = _distances(edges)
    is_offset, is_column = np.zeros(length, np.int32), np.zeros(length, bool)
    is_offset[offsets[offsets < length]] = 1
    is_column[columns[columns < length]] = True
    below = np.concatenate([[0], np.cumsum(is_offset, dtype=np.int32)])
    seen = np.where(is_column, distances, below[distances])
    return _by_cell(seen, edges) / np.maximum(_by_cell(distances, edges), 1)


def _edges(length: int, side: int) -> NDArray[np.int64]:
    return np.arange(side + 1) * length // side


def _distances(edges: NDArray[np.int64]) -> NDArray[np.int32]:
    keys = np.arange(edges[-1], dtype=np.int32)
    return np.maximum(edges[:, None].astype(np.int32) - keys, 0)


def _by_cell(seen: NDArray[np.int32], edges: NDArray[np.int64]) -> NDArray[Any]:
    """Turn counts of pairs in the rows before each edge, per key, into counts of each cell."""
    return np.diff(np.add.reduceat(seen, edges[:-1], axis=1, dtype=np.int64), axis=0)


def _png(levels: Levels) -> str:
    import matplotlib
    from PIL import Image

    colours = matplotlib.colormaps[MAP_COLOURS](np.linspace(0, 1, _MAP_LEVELS), bytes=True)
    alphas = np.linspace(80, 255, _MASK_LEVELS).astype(int).tolist()
    palette = [
        (0, 0, 0, 0),
        *(tuple(int(part) for part in colour) for colour in colours),
        (128, 128, 128, 46),
        *((47, 111, 208, alpha) for alpha in alphas),
    ]
    image = Image.fromarray(levels, mode="P")
    image.putpalette([part for entry in palette for part in entry[:3]])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes(entry[3] for entry in palette))
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
