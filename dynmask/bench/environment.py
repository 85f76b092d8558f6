"""Where a figure comes from: device, clocks, versions, commit, date."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dynmask import __version__
from dynmask.bench.timing import Clock, Run, Times

_CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu")
_FACTS = ("name", "driver_version", "power.limit", "memory.total")


def environment(device: str) -> dict[str, Any]:
    """Return device, versions, commit and date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": describe(device),
        "versions": versions(),
        "commit": commit(),
    }


def describe(device: str) -> dict[str, Any]:
    """Return what the device is; a CPU's figures are marked as no measurement of a kernel."""
    if device == "cpu":
        return {"type": "cpu", "name": processor(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "type": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **(nvidia_smi(_FACTS) or {}),
    }


def clocks(device: str) -> dict[str, str] | None:
    """Return the GPU's clocks and temperature of this moment, or None where nobody tells."""
    return nvidia_smi(_CLOCKS) if device == "cuda" else None


def nvidia_smi(fields: tuple[str, ...]) -> dict[str, str] | None:
    """Ask ``nvidia-smi`` for fields of the current GPU; None if it is not there or fails."""
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            [*command, f"--id=GPU-{uuid.removeprefix('GPU-')}"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None


def versions() -> dict[str, str]:
    """Return the versions that decide a figure."""
    found = {
        "python": platform.python_version(),
        "dynmask": __version__,
        "torch": torch.__version__,
    }
    for name in ("triton", "flash-sparse-attn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the git commit of this checkout, ``-dirty`` if changed; None if it is no checkout."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def ceilings(clock: Clock) -> dict[str, float]:
    """Measure what the device can do: a large copy and a large matrix product.

    Returns:
        ``copy``: bytes read plus bytes written per second. ``matmul``: floating-point operations
        per second of a bf16 product (fp32 on a CPU).
    """
    big = clock.device.type == "cuda"
    source = torch.randn((1 << 29) if big else (1 << 20), device=clock.device)
    target = torch.empty_like(source)
    copied = _median(clock, Run(partial(target.copy_, source)))
    moved = 2 * source.numel() * source.element_size()
    del source, target
    side = 8192 if big else 256
    dtype = torch.bfloat16 if big else torch.float32
    left, right = torch.randn(2, side, side, device=clock.device).to(dtype)
    multiplied = _median(clock, Run(lambda: left @ right))
    return {"copy": moved / copied, "matmul": 2 * side**3 / multiplied}


def _median(clock: Clock, run: Run) -> float:
    for _ in range(3):
        clock.seconds(run)
    return Times.of([clock.seconds(run) for _ in range(9)]).median


def processor() -> str:
    """Return the processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"
