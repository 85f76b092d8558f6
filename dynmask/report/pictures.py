"""Small PNG pictures of attention maps and masks, as data URIs.

Every picture is square, rows are queries and columns are keys, and the future (j > i) is
transparent, so that the page's own background shows through in light and in dark.
"""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dynmask.dam.layer import PREVIEW_SIZE

#: Largest side of a picture in pixels, that of the plan's previews.
PICTURE_SIZE = PREVIEW_SIZE
MAP_COLOURS = "viridis"
#: Range of a map's colour scale, as a factor of its largest value.
MAP_RANGE = 1e-4
_TINY = float(np.finfo(np.float32).tiny)
_HIDDEN_RGBA = (128, 128, 128, 46)
_VISIBLE_RGBA = (47, 111, 208, 255)


def pool(picture: Tensor, size: int = PICTURE_SIZE) -> Tensor:
    """Shrink a mask to at most `size` by `size` pixels; each is visible if any pair in it is.

    Args:
        picture: `[L, L]` bool.
        size: Largest side of the result, in pixels.

    Returns:
        `[P, P]` float32 with `P = min(L, size)`.
    """
    length = picture.shape[-1]
    if length <= size:
        return picture.float()
    return functional.adaptive_max_pool2d(picture.float()[None], size)[0]


def map_picture(attention: Tensor, *, log: bool) -> str:
    """Draw a map with a sequential colour scale.

    Args:
        attention: `[P, P]` values; those above the diagonal do not count.
        log: Colour by `log10` over the range `MAP_RANGE * max .. max`, so that structure below the
            peaks is seen; else linearly from the smallest to the largest value.

    Returns:
        A ``data:image/png`` URI.
    """
    import matplotlib

    values = attention.detach().float().cpu().numpy()
    causal = values[np.tril_indices(len(values))]
    low, peak = float(causal.min()), float(causal.max())
    if log:
        share = values / max(peak, _TINY)
        shade = 1 - np.log10(np.clip(share, MAP_RANGE, 1)) / np.log10(MAP_RANGE)
    else:
        shade = np.clip((values - low) / max(peak - low, _TINY), 0, 1)
    # Palette entry 0 is the transparent future; 1 to 255 are the colours.
    index = _with_future(1 + np.rint(shade * 254).astype(np.uint8))
    colours = matplotlib.colormaps[MAP_COLOURS](np.linspace(0, 1, 255), bytes=True)
    palette = [(0, 0, 0, 0), *(tuple(int(v) for v in colour) for colour in colours)]
    return _png(index, palette)


def mask_picture(mask: Tensor) -> str:
    """Draw a mask: visible pairs blue, hidden pairs grey.

    Args:
        mask: `[P, P]`, 0 is hidden.

    Returns:
        A ``data:image/png`` URI.
    """
    index = _with_future(1 + (mask.detach().cpu().numpy() > 0).astype(np.uint8))
    return _png(index, [(0, 0, 0, 0), _HIDDEN_RGBA, _VISIBLE_RGBA])


def _with_future(index: NDArray[np.uint8]) -> NDArray[np.uint8]:
    index[np.triu_indices(index.shape[0], k=1)] = 0
    return index


def _png(index: NDArray[np.uint8], palette: list[tuple[int, ...]]) -> str:
    from PIL import Image

    image = Image.fromarray(index, mode="P")
    image.putpalette([value for entry in palette for value in entry[:3]])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes(entry[3] for entry in palette), optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
