"""What the Hopper kernels use of Gluon, under the names of every Triton that has it.

Raises ImportError where Triton has no Gluon, or one that lacks a part.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

__all__ = ["arrive_when_copied", "async_load", "barrier", "gl", "gluon", "hopper", "mbarrier"]

try:
    # Renamed after Triton 3.6.
    async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
    barrier = getattr(gl, "barrier", None) or gl.thread_barrier
    arrive_when_copied = async_copy.mbarrier_arrive
except AttributeError as missing:
    raise ImportError(f"this Triton's Gluon has no {missing.name}") from missing
