"""Registration of torch operators, without the per-call checks of ``torch.library.custom_op``.

Those take the host longer than many of our kernels take the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

LIBRARY = torch.library.Library("dynmask", "FRAGMENT")

_Function = TypeVar("_Function", bound=Callable[..., object])


def operator(name: str) -> Callable[[_Function], _Function]:
    """Register a function as ``torch.ops.dynmask.<name>``; its annotations are the schema.

    It must not change its arguments or return one of them. The CPU runs it too, for Triton's
    interpreter.

    Returns:
        A decorator that replaces the function by the operator.
    """

    def register(function: _Function) -> _Function:
        schema: str = torch.library.infer_schema(function, mutates_args=())
        LIBRARY.define(name + schema)
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, function, key)
        made: _Function = getattr(torch.ops.dynmask, name).default
        return made

    return register


def fake(name: str) -> Callable[[_Function], _Function]:
    """Register the shapes of an operator's results, for tracing."""
    register: Callable[[_Function], _Function] = torch.library.register_fake(
        f"dynmask::{name}", lib=LIBRARY
    )
    return register
