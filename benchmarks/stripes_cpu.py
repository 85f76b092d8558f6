"""Time the `cpu` backend against torch's causal SDPA kernel on the same cores.

    python benchmarks/stripes_cpu.py [--threads N] [--longest 16384] [--rounds 7] [--out FILE]

Every round runs SDPA (is_causal=True) and then each mask, so both see the same machine; a cell's
ratio is the median over rounds of SDPA's time / ours. Above 1 the sparse backend is faster. A cell
is timed only after its output agreed with the reference backend.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

import dynmask
from dynmask.bench.environment import environment
from dynmask.masks import Stripes
from dynmask.ops import attention, choose, computed_pairs

HEADS, GROUPS, DIM = 8, 4, 64
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
DENSITIES = (0.05, 0.1, 0.2, 0.4)


def dam(length: int, keys: int) -> Stripes:
    """What DAM finds: a local window, an early cluster, scattered columns, a few far offsets."""
    columns, offsets = [], []
    for head in range(HEADS):
        g = torch.Generator().manual_seed(head)
        window = max(1, int(0.4 * keys))
        far = torch.randint(length, (min(16, keys // 8),), generator=g)
        scattered = torch.randperm(length, generator=g)[: keys - window]
        columns.append(torch.cat([torch.arange(min(64, keys // 8)), scattered]).unique())
        offsets.append(torch.cat([torch.arange(window), far]).unique())
    return Stripes(tuple(columns), tuple(offsets), torch.zeros(HEADS, dtype=torch.bool))


def columns(length: int, keys: int) -> Stripes:
    """Scattered columns only."""
    picks = []
    for head in range(HEADS):
        g = torch.Generator().manual_seed(head)
        picks.append(torch.randperm(length, generator=g)[:keys].sort().values)
    own = torch.zeros(1, dtype=torch.int64)
    return Stripes(tuple(picks), (own,) * HEADS, torch.zeros(HEADS, dtype=torch.bool))


def streaming(length: int, keys: int) -> Stripes:
    """StreamingLLM: sinks and a window."""
    return Stripes.streaming(HEADS, sinks=min(16, keys - 1), window=max(1, keys - 16))


KINDS: dict[str, Callable[[int, int], Stripes]] = {
    "dam": dam,
    "columns": columns,
    "streaming": streaming,
}


def with_density(kind: str, length: int, density: float) -> Stripes:
    """Return the smallest mask of this kind with at least this density at this length."""
    low, high = 2, length
    while low < high:
        keys = (low + high) // 2
        if float(KINDS[kind](length, keys).density(length).mean()) < density:
            low = keys + 1
        else:
            high = keys
    return KINDS[kind](length, low)


def gate(q, k, v, mask: Stripes) -> float:
    """Compare three blocks of rows with the reference; raise unless they agree."""
    length = q.shape[2]
    out = attention(q, k, v, mask, impl="cpu")
    worst = 0.0
    for first in {0, length // 2, length - 64}:
        rows = slice(first, first + 64)
        seen = slice(0, first + 64)
        expected = attention(q[:, :, rows], k[:, :, seen], v[:, :, seen], mask, impl="reference")
        worst = max(worst, float((out[:, :, rows] - expected).abs().max()))
    if not worst < 1e-4:
        raise SystemExit(f"wrong result at {length} tokens: error {worst}")
    return worst


def timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def in_turn(
    runs: dict[str, Callable[[], object]], rounds: int, *, repeats: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of each, by round, after a round that warms up; all in every round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            spent = sum(timed(run) for _ in range(repeats)) / repeats
            if turn:
                times[name].append(spent)
    return times


def quartiles(values: list[float]) -> list[float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [round(x, 6) for x in (low, middle, high)]


def measure(length: int, density: float, q_len: int, rounds: int) -> list[dict]:
    """Time every kind of mask against SDPA at one length and density."""
    torch.manual_seed(0)
    q = torch.randn(1, HEADS, length, DIM)
    k, v = torch.randn(2, 1, GROUPS, length, DIM)
    masks = {kind: with_density(kind, length, density) for kind in KINDS}
    errors = {kind: gate(q, k, v, mask) for kind, mask in masks.items()}
    q = q[:, :, length - q_len :]

    runs: dict[str, Callable[[], object]] = {
        "sdpa": partial(scaled_dot_product_attention, q, k, v, is_causal=q_len > 1, enable_gqa=True)
    }
    for kind, mask in masks.items():
        runs[kind] = partial(attention, q, k, v, mask, impl="cpu")
    times = in_turn(runs, rounds, repeats=1 if q_len > 1 else 20)
    causal = q_len * length - q_len * (q_len - 1) // 2
    return [
        {
            "call": "prefill" if q_len > 1 else "decode",
            "length": length,
            "kind": kind,
            "density_target": density,
            "density_requested": float(mask.visible_pairs(q_len, length).double().mean() / causal),
            "density_computed": float(computed_pairs(mask, q_len, length).double().mean() / causal),
            "sdpa_seconds": quartiles(times["sdpa"]),
            "cpu_seconds": quartiles(times[kind]),
            "ratio": quartiles(
                [s / t for s, t in zip(times["sdpa"], times[kind], strict=True)],
            ),
            "auto": choose(q, k, v, mask),
            "error": errors[kind],
        }
        for kind, mask in masks.items()
    ]


def show(cells: list[dict]) -> None:
    """Print one line per cell, then where the sparse backend begins to win."""
    print(f"{'call':8}{'tokens':>7} {'mask':10}{'density':>8}{'computed':>9}", end="")
    print(f"{'sdpa ms':>10}{'cpu ms':>9}{'ratio':>7} {'quartiles':>14}  auto")
    for c in cells:
        low, middle, high = c["ratio"]
        print(
            f"{c['call']:8}{c['length']:7d} {c['kind']:10}{c['density_requested']:8.3f}"
            f"{c['density_computed']:9.3f}{c['sdpa_seconds'][1] * 1e3:10.2f}"
            f"{c['cpu_seconds'][1] * 1e3:9.2f}{middle:7.2f} {f'{low:.2f} .. {high:.2f}':>14}"
            f"  {c['auto']}"
        )
    print("\nshortest length from which the cpu backend is faster (prefill):")
    for kind in KINDS:
        for density in DENSITIES:
            mine = [
                c
                for c in cells
                if (c["call"], c["kind"], c["density_target"]) == ("prefill", kind, density)
            ]
            losing = max((c["length"] for c in mine if c["ratio"][1] <= 1), default=0)
            winning = [c["length"] for c in mine if c["length"] > losing]
            print(f"  {kind:10} {density:.0%}: {min(winning) if winning else 'none'}")


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def options(about: str, *, rounds: int) -> argparse.Namespace:
    """What the benchmarks on a CPU take; sets the threads."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--longest", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    return given


def write(given: argparse.Namespace, cells: list[dict], load: list[float], **more: object) -> None:
    """Write the cells with what they ran on, if there is an ``--out``."""
    if not given.out:
        return
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": given.threads,
        "load_average_1min": load,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dynmask": dynmask.__version__,
        "commit": environment("cpu")["commit"],
        "baseline": "torch scaled_dot_product_attention, is_causal=True, float32",
        "shape": {"batch": 1, "heads": HEADS, "kv_heads": GROUPS, "dim": DIM},
        **more,
        "rounds": given.rounds,
        "cells": cells,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    given = options(__doc__ or "", rounds=7)
    load = [os.getloadavg()[0]]
    cells = []
    with torch.inference_mode():
        for length in LENGTHS:
            if length > given.longest:
                continue
            for density in DENSITIES:
                cells += measure(length, density, length, given.rounds)
                print(f"{length} tokens, {density:.0%}: done", flush=True)
            load.append(os.getloadavg()[0])
        for length in LENGTHS:
            if length <= given.longest:
                cells += measure(length, 0.1, 1, given.rounds)
    show(cells)
    write(given, cells, load, seconds="quartiles over rounds; ratio = sdpa / cpu within a round")


if __name__ == "__main__":
    main()
