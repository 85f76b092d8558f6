"""What is kept: masks whose size is linear in the length."""

from dynmask.masks.blocks import Blocks
from dynmask.masks.documents import Documents
from dynmask.masks.lifetimes import Lifetimes
from dynmask.masks.padding import Padding
from dynmask.masks.stripes import Stripes

Mask = Stripes | Lifetimes | Blocks
"""Every mask that `dynmask.ops.attention` takes."""

__all__ = ["Blocks", "Documents", "Lifetimes", "Mask", "Padding", "Stripes"]
