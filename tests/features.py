"""What an older torch or Triton lacks, by probing: tests that need it are skipped and say so.

``tests/test_features.py`` sees to it that the pinned versions, and newer ones, lack nothing.
"""

import importlib
from functools import cache

import pytest
import torch

from dynmask.masks import Documents, Lifetimes
from dynmask.ops import attention, supports


@cache
def lacks_compile():
    """Why torch.compile cannot take dynmask's masks: None if it can."""

    def run(q, expiry, numbers):
        return attention(q, q, q, Lifetimes(expiry) & Documents(numbers), impl="sdpa")

    given = torch.zeros(1, 1, 9, 16), torch.full((1, 1, 9), 9).int(), torch.arange(9)[None] // 4
    try:
        torch.compile(run, backend="eager", fullgraph=True)(*given)
    except Exception as refused:
        return f"torch {torch.__version__} cannot compile masks: {type(refused).__name__}"
    finally:
        torch.compiler.reset()
    return None


@cache
def lacks_flex():
    """Why the ``flex`` backend cannot run at all: None if it can."""
    q = torch.zeros(1, 1, 1, 16)
    return supports("flex", q, q, q)


@cache
def lacks_kernels():
    """Why the GPU kernels cannot be imported: None if they can."""
    try:
        importlib.import_module("dynmask.ops.triton")
    except ImportError as missing:
        return f"the kernels cannot be imported: {missing.msg}"
    return None


def lacks_cpu_shards():
    """Why FSDP2 cannot run on the CPU: None if it can."""
    if not hasattr(torch.cpu.current_stream(), "record_event"):
        return f"FSDP2 of torch {torch.__version__} runs on devices only"
    return None


def needs(lack):
    """Skip the test where ``lack()`` gives a reason."""
    reason = lack()
    if reason is not None:
        pytest.skip(reason)
