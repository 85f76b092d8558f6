"""Time the `triton` backend under Stripes and Blocks against torch's dense causal kernels on a GPU.

    python benchmarks/stripes_gpu.py [--lengths 8192 32768] [--rounds 10] [--backward] [--out FILE]

bfloat16, 32 heads on 8, D 128. Every round runs cuDNN's and flash's causal SDPA and then each mask,
after the L2 cache was flushed; a cell's ratio is the median of the fastest dense kernel's time over
ours. Tables and lists that a mask keeps are made before, lists that it does not keep are timed. A
cell is timed only after its output agreed with the reference backend on sampled rows. With
`--backward` the gradients of q, k and v are timed instead of the output.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import stripes_cpu
import torch

from dynmask.bench import dense
from dynmask.bench.environment import environment
from dynmask.bench.timing import Clock, Run, measure
from dynmask.masks import Blocks, Stripes
from dynmask.ops import attention

HEADS, GROUPS, DIM = 32, 8, 128
stripes_cpu.HEADS = HEADS


def blocks(length: int, density: float) -> Blocks:
    """Random key blocks of 64 for query tiles of 128, the own ones always there."""
    block, tile = 64, 128
    tiles = -(-length // tile)
    random = torch.Generator().manual_seed(0)
    most = max(2, round(density * length / block))
    indices = torch.zeros(1, GROUPS, tiles, most, dtype=torch.int32)
    counts = torch.zeros(1, GROUPS, tiles, dtype=torch.int32)
    for t in range(tiles):
        own = torch.arange(t * tile // block, min((t + 1) * tile, length + block - 1) // block)
        chosen = max(0, round(density * (t + 0.5) * tile / block) - len(own))
        for g in range(GROUPS):
            past = torch.randperm(max(1, int(own[0])), generator=random)[:chosen]
            picks = torch.cat([past[past < own[0]], own])[-most:].sort().values
            indices[0, g, t, : len(picks)] = picks.int()
            counts[0, g, t] = len(picks)
    return Blocks(indices, counts, block=block, tile=tile).to("cuda")


def masks(length: int, density: float) -> dict[str, Stripes | Blocks]:
    made = {k: stripes_cpu.with_density(k, length, density).to("cuda") for k in stripes_cpu.KINDS}
    return {**made, "blocks": blocks(length, density)}


def gate(q, k, v, mask: Stripes | Blocks) -> float:
    """Return the largest error on three blocks of rows, relative to the outputs' size."""
    length = q.shape[2]
    out = attention(q, k, v, mask, impl="triton")
    worst = 0.0
    for first in {0, length // 2, length - 16}:
        seen = slice(0, first + 16)
        rows = [t[:, :, seen].float() for t in (k, v)]
        part = q[:, :, first : first + 16].float()
        expected = attention(part, *rows, mask, impl="reference")
        error = (out[:, :, first : first + 16].float() - expected).abs().max()
        worst = max(worst, float(error / expected.abs().max()))
    if not worst < 2e-2:
        raise SystemExit(f"wrong result at {length} tokens: error {worst}")
    return worst


def gradients(attend, inputs, grad) -> Run:
    """Return the backward pass of a call whose forward pass has run."""
    out = attend(*inputs)
    return Run(partial(torch.autograd.grad, out, inputs, grad, retain_graph=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    clock = Clock(torch.device("cuda"))
    cells = []
    for length in args.lengths:
        torch.manual_seed(0)
        q, k, v = (
            torch.randn(1, h, length, DIM, device="cuda", dtype=torch.bfloat16)
            for h in (HEADS, GROUPS, GROUPS)
        )
        attends = dense.causal(torch.device("cuda"))
        for density in args.densities:
            made = masks(length, density)
            errors = {kind: gate(q, k, v, mask) for kind, mask in made.items()}
            calls = dict(attends)
            for kind, mask in made.items():
                calls[kind] = partial(attention, mask=mask, impl="triton")
            if args.backward:
                grad, inputs = torch.randn_like(q), [t.requires_grad_() for t in (q, k, v)]
                runs = {name: gradients(call, inputs, grad) for name, call in calls.items()}
            else:
                runs = {name: Run(partial(call, q, k, v)) for name, call in calls.items()}
            with torch.set_grad_enabled(args.backward):
                times = measure(runs, clock, rounds=args.rounds, warmups=3, budget=4)
            for t in (q, k, v):
                t.requires_grad_(False)
            best = dense.fastest({name: times[name] for name in attends})
            for kind, mask in made.items():
                ratio = times[best].median / times[kind].median
                cells.append(
                    {
                        "length": length,
                        "kind": kind,
                        "density": float(mask.density(length).mean()),
                        "seconds": times[kind].to_dict(),
                        "dense": {"name": best, **times[best].to_dict()},
                        "ratio": ratio,
                        "error": errors[kind],
                    }
                )
                print(f"{length:>7} {kind:<10} {density:4.0%}  {ratio:5.2f}x", flush=True)
        if args.out:
            result = {**environment("cuda"), "rounds": args.rounds, "cells": cells}
            result["timed"] = "backward" if args.backward else "forward"
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
