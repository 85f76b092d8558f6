"""dynmask: long-context transformers made fast with attention masks that follow the content.

``import dynmask`` is light: transformers and triton load only when a name that needs them is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "attention": "dynmask.ops",
    "supports": "dynmask.ops",
    "Blocks": "dynmask.masks",
    "BoundedKeys": "dynmask.ops",
    "DmaConfig": "dynmask.dma",
    "DmaForCausalLM": "dynmask.dma",
    "DmaModel": "dynmask.dma",
    "Documents": "dynmask.masks",
    "DynamicMaskAttention": "dynmask.dma",
    "LifetimeCache": "dynmask.dma",
    "Lifetimes": "dynmask.masks",
    "Padding": "dynmask.masks",
    "Stripes": "dynmask.masks",
    "MaskPlan": "dynmask.dam",
    "accelerate": "dynmask.hf",
    "calibrate": "dynmask.hf",
    "from_doge": "dynmask.dma",
    "from_pretrained_dense": "dynmask.dma",
}

if TYPE_CHECKING:
    from dynmask.dam import MaskPlan
    from dynmask.dma import (
        DmaConfig,
        DmaForCausalLM,
        DmaModel,
        DynamicMaskAttention,
        LifetimeCache,
        from_doge,
        from_pretrained_dense,
    )
    from dynmask.hf import accelerate, calibrate
    from dynmask.masks import Blocks, Documents, Lifetimes, Padding, Stripes
    from dynmask.ops.attention import attention, supports
    from dynmask.ops.bounded import BoundedKeys

__all__ = [
    "Blocks",
    "BoundedKeys",
    "DmaConfig",
    "DmaForCausalLM",
    "DmaModel",
    "Documents",
    "DynamicMaskAttention",
    "LifetimeCache",
    "Lifetimes",
    "MaskPlan",
    "Padding",
    "Stripes",
    "accelerate",
    "attention",
    "calibrate",
    "from_doge",
    "from_pretrained_dense",
    "supports",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dynmask' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
