"""What masks ask of any argument, and the error that names it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def require_tensor(name: str, value: Any) -> None:
    """Refuse what is no tensor.

    Raises:
        ValueError: Naming the argument.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch tensor, got {type(value).__name__}")


def require_integer(name: str, value: Any) -> None:
    """Refuse what is no integer; True and False are none.

    Raises:
        ValueError: Naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise ValueError(f"{name}={value!r} must be an integer")
