"""What is kept: masks whose size is linear in the length."""

from dynmask.masks.lifetimes import Lifetimes
from dynmask.masks.padding import Padding
from dynmask.masks.stripes import Stripes

__all__ = ["Lifetimes", "Padding", "Stripes"]
