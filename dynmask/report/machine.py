"""Facts about the machine and the versions, so that a figure can be read later."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from dynmask.bench.environment import processor

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy", "safetensors", "matplotlib")


def machine() -> dict[str, Any]:
    """Return processor, cores, torch's threads, memory in GiB, and the GPUs by name.

    Cores are those that this process may use, which in a container can be fewer than the
    machine has.
    """
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpus": [
            torch.cuda.get_device_name(index)
            for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        ],
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, dynmask and the packages it works with that are installed."""
    import dynmask

    found = {"python": platform.python_version(), "dynmask": dynmask.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float | None:
    """Return the physical memory in GiB, or None where the system does not say."""
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    return round(pages * size / 2**30, 1)
