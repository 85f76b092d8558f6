"""Programs of the kernels for rows with a list of key blocks each, as NSA and MoBA have: a sweep.

    python benchmarks/row_lists.py --out row_lists.json        # on a GPU
    TRITON_INTERPRET=1 python benchmarks/row_lists.py --tiny   # that it runs; times mean nothing

Rows, keys, warps and stages of `dynmask.ops.triton.common.fit_rows` are replaced by each of a list;
"before" is what programs for tiles of many rows have. Outputs must agree before they are timed.
Backward is dq, dk and dv together; only dq's programs change.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dynmask.bench.environment import environment
from dynmask.bench.timing import Clock, Run, measure
from dynmask.masks import Blocks
from dynmask.ops import attention

Shape = tuple[int, int, int, int]

# Batch, kv heads, query heads of one, head size, length, listed blocks of 64 keys.
CASES = [
    (16, 3, 2, 64, 4096, 6),
    (8, 4, 1, 32, 8192, 6),
    (1, 4, 16, 128, 16384, 16),
    (2, 4, 4, 128, 8192, 16),
]
TINY = [(1, 1, 1, 16, 64, 1)]
# Rows, keys, warps, stages.
FORWARD: list[Shape] = [
    *((16, 64, warps, 3) for warps in (1, 2, 4)),
    *((16, 64, 2, 2), (16, 128, 4, 3), (16, 128, 2, 2), (16, 32, 1, 3), (16, 32, 2, 4)),
    *((32, 64, 2, 3), (32, 64, 4, 3)),
]
BACKWARD: list[Shape] = [
    *((16, 64, warps, 3) for warps in (1, 2, 4)),
    *((16, 32, 2, 3), (16, 128, 4, 2), (16, 64, 2, 2), (16, 32, 1, 3)),
]
MODULES = {
    name: importlib.import_module(f"dynmask.ops.triton.{name}") for name in ("forward", "backward")
}
CLOSE = 2e-2


def under(shape: Shape | None, name: str, call: Callable[[], Any]) -> Any:
    """Call with programs of a shape; None for that of tiles of many rows."""
    module = MODULES[name]
    before = module.fit_rows
    module.fit_rows = lambda q, packed, usual: usual if shape is None else shape
    try:
        return call()
    finally:
        module.fit_rows = before


def sweep(
    case: tuple[int, ...], device: str, shapes: dict[str, list[Shape]], rounds: int
) -> list[dict[str, Any]]:
    """Time both passes of a case with every shape, in turn."""
    batch, groups, ratio, dim, length, blocks = case
    draw = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    options = {"device": device, "dtype": dtype, "generator": draw}
    q, k, v = (
        torch.randn(batch, heads, length, dim, **options).requires_grad_()
        for heads in (groups * ratio, groups, groups)
    )
    own = torch.arange(length, device=device) // 64
    place = torch.arange(length // 64, device=device)
    score = torch.rand(batch, groups, length, length // 64, device=device, generator=draw)
    score = score.masked_fill(place > own[:, None], -1).masked_fill(place == own[:, None], 2)
    counts = (own + 1).clamp_max(blocks).int().expand(batch, groups, length).contiguous()
    mask = Blocks(score.topk(blocks).indices.int(), counts, block=64, tile=1)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return attention(q, k, v, mask, impl="triton")

    out = attention(q, k, v, mask, impl="triton")
    grad = torch.randn(out.shape, **options)

    def backward() -> torch.Tensor:
        return torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)[0]

    cells = []
    for name, call in (("forward", forward), ("backward", backward)):
        tried = [None, *shapes[name]]
        wanted = call()
        runs = {}
        for shape in tried:
            run = partial(under, shape, name, call)
            torch.testing.assert_close(run(), wanted, rtol=CLOSE, atol=CLOSE)
            runs[str(shape)] = Run(run)
        times = measure(runs, Clock(torch.device(device)), rounds=rounds, warmups=2, budget=20.0)
        names = ("batch", "kv_heads", "ratio", "head_dim", "length", "blocks")
        head = {"pass": name, **dict(zip(names, case, strict=True))}
        for shape in tried:
            of = ("rows", "keys", "warps", "stages")
            programs = {"before": True} if shape is None else dict(zip(of, shape, strict=True))
            seconds = times[str(shape)].median
            cells.append({**head, **programs, "milliseconds": round(1e3 * seconds, 3)})
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="a small case, two shapes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = {"forward": FORWARD, "backward": BACKWARD}
    if args.tiny:
        shapes = {name: of[-1:] for name, of in shapes.items()}
    document: dict[str, Any] = {"environment": environment(device), "cells": []}
    for case in TINY if args.tiny else CASES:
        for cell in sweep(case, device, shapes, args.rounds):
            document["cells"].append(cell)
            print(cell, flush=True)
        if args.out:
            args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
