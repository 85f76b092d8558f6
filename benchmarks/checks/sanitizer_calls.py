"""Call every Triton kernel once or twice at small odd sizes; what `sanitizer.py` watches.

One line for each call that ended; its results are held to the reference backend on the CPU, those
of dynamic masks to be finite.
``--launched FILE`` writes which kernels were launched. Without a GPU: TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime import interpreter, jit

from dynmask.baselines.nsa_compress import importance
from dynmask.baselines.triton.importance import block_importance
from dynmask.dam.dynamic import Dynamic, dynamic_attention
from dynmask.dam.paged import PagedKeys
from dynmask.masks import Blocks, Documents, Lifetimes, Mask, Padding, Stripes
from dynmask.masks.lifetimes import _expiry_of_top
from dynmask.masks.triton.select import Level, Plan, expiry_of_top, run_plan
from dynmask.ops import BoundedKeys, attention
from dynmask.ops.bounded_rules import insert_by_torch
from dynmask.ops.triton import blocks_backward, stripes_backward
from dynmask.ops.triton import insert as insert_module

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The last two are those of the kernels for Hopper.
KINDS = [(torch.float32, 16), *([(torch.float16, 64), (torch.bfloat16, 128)] if GPU else [])]
BATCH, HEADS, GROUPS, LENGTH = 2, 4, 2, 141
LAUNCHED: set[str] = set()
CLOSE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def note_launches() -> None:
    """Remember the module and name of each kernel that is launched."""
    for kind in (jit.KernelInterface, jit.JITFunction, interpreter.InterpretedFunction):
        if "__getitem__" in vars(kind):
            kind.__getitem__ = noting(kind.__getitem__)


def noting(real: Callable[..., Any]) -> Callable[..., Any]:
    def launch(kernel: Any, grid: Any) -> Any:
        LAUNCHED.add(f"{kernel.fn.__module__}.{kernel.fn.__name__}")
        return real(kernel, grid)

    return launch


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(found: Tensor, wanted: Tensor, *, close: float = 0.0) -> None:
    found = found.cpu()
    torch.testing.assert_close(
        found, wanted.to(found.dtype), rtol=close, atol=close, equal_nan=False
    )


def attend(
    mask: Mask, q_len: int, *, gradients: bool, biased: bool = True, length: int = LENGTH
) -> None:
    """Hold outputs and gradients to those of the reference backend in float64, on the CPU."""
    for dtype, dim in KINDS:
        given = [random(BATCH, HEADS, q_len, dim, seed=1, dtype=dtype)]
        given += [random(BATCH, GROUPS, length, dim, seed=s, dtype=dtype) for s in (2, 3)]
        bias = [random(BATCH, GROUPS, length, seed=4)] if biased else []
        results = []
        for device, impl in ((DEVICE, "triton"), ("cpu", "reference")):
            kind = {"dtype": torch.float64} if impl == "reference" else {}
            inputs = [t.clone().to(device, **kind).requires_grad_(gradients) for t in given + bias]
            options = {"bias": inputs[3]} if biased else {}
            out = attention(*inputs[:3], mask.to(device), impl=impl, **options)
            if gradients:
                out.backward(random(*out.shape, seed=5).to(out))
            grads = [t.grad for t in inputs] if gradients else []
            results.append([t.detach().cpu() for t in (out, *grads)])
        for found, wanted in zip(*results, strict=True):
            same(found, wanted, close=CLOSE[dtype])


def a_padding() -> Padding:
    return Padding(torch.tensor([7, 0]), torch.tensor([LENGTH, LENGTH - 9]))


def select() -> None:
    score = random(BATCH, GROUPS, 301)
    documents = (torch.arange(301) >= 190).long().expand(BATCH, -1).clone()
    for options in ({}, {"documents": Documents(documents)}):
        found = Lifetimes.top(score.to(DEVICE), keep=17, **on_device(options))
        wanted = Lifetimes.top(score, keep=17, **options)
        same(found.expiry, wanted.expiry)
    # Levels as of long inputs, on a short one: all kernels of a selection.
    fine = Level(16, 16, 1)
    for plan in (
        Plan((Level(64, 64, 1), Level(32, 64, 1), fine), blocks=(64,)),
        Plan((Level(32, 64, 1), Level(16, 64, 1)), best=True, blocks=(32,)),
    ):
        same(run_plan(score.to(DEVICE), 13, None, plan), _expiry_of_top(score, 13, None, 0))
        late = run_plan(score.to(DEVICE), 13, None, plan, 250).cpu()
        same(visible(late), visible(_expiry_of_top(score, 13, None, 0)))
    last = expiry_of_top(score.to(DEVICE), 13, None, 300).cpu()
    same(last > 300, _expiry_of_top(score, 13, None, 0) > 300)


def visible(expiry: Tensor, first: int = 250) -> Tensor:
    """Return what rows from ``first`` on see."""
    row, slot = torch.arange(first, expiry.shape[2])[:, None], torch.arange(expiry.shape[2])
    return (slot <= row) & (row < expiry[:, :, None])


def on_device(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(DEVICE) for name, value in options.items()}


def a_choice(keep_count: int) -> Lifetimes:
    return Lifetimes.top(random(BATCH, GROUPS, LENGTH, seed=6), keep=keep_count)


def schedule_forward_backward() -> None:
    for mask in (a_choice(15), a_choice(15) & a_padding(), a_choice(LENGTH - 5)):
        attend(mask, LENGTH, gradients=True)
    attend(a_choice(15), 33, gradients=True, biased=False)


def spans() -> None:
    """Keys from more than one span of the backward pass; few rows, for the reference's sake."""
    length = 4133
    mask = Lifetimes.top(random(BATCH, GROUPS, length, seed=6), keep=33)
    attend(mask, 40, gradients=True, length=length)


def decode() -> None:
    attend(a_choice(15), 1, gradients=False)
    # More than a program takes: splits, and their combination.
    mask = Lifetimes.top(random(BATCH, GROUPS, 601, seed=6), keep=150)
    attend(mask, 1, gradients=False, length=601)


def insert() -> None:
    count, keep_count = 13, 5
    k, v = (random(BATCH, GROUPS, count, 24, seed=s) for s in (1, 2))
    score = random(BATCH, GROUPS, count, seed=3)
    states = [
        BoundedKeys(keep_count, batch=BATCH, groups=GROUPS, dim=24, threshold=-1.0, device=device)
        for device in (DEVICE, "cpu")
    ]
    names = ("k", "v", "score", "order", "expiry")
    for at in range(count):
        present = torch.tensor([at % 4 != 1, True])
        token = [t[:, :, at : at + 1] for t in (k, v, score)]
        for state, run in zip(states, (insert_module.insert, insert_by_torch), strict=True):
            here = [t.to(state.k.device) for t in (*token, present)]
            run(*(getattr(state, name) for name in names), *here, state.threshold)
    for name in names:
        same(getattr(states[0], name), getattr(states[1], name))


def some_stripes() -> Stripes:
    draw = torch.Generator().manual_seed(0)

    def some(most: int, count: int) -> Tensor:
        return 1 + torch.randperm(most, generator=draw)[:count].sort().values

    zero = torch.zeros(1, dtype=torch.int64)
    return Stripes(
        tuple(some(LENGTH - 1, 5 + head) for head in range(HEADS)),
        tuple(torch.cat([zero, some(60, 9 + head)]) for head in range(HEADS)),
        torch.tensor([head == 2 for head in range(HEADS)]),
        torch.rand(HEADS, 37, 37, generator=draw).gt(0.6).tril(),
    )


def stripes_forward_backward() -> None:
    attend(some_stripes(), LENGTH, gradients=True)
    attend(some_stripes() & a_padding(), 77, gradients=True, biased=False)


def stripes_decode() -> None:
    attend(some_stripes(), 1, gradients=False)
    attend(some_stripes(), 1, gradients=False, length=613)


def some_blocks() -> Blocks:
    draw, block, tile = torch.Generator().manual_seed(0), 16, 48
    tiles, width = -(-LENGTH // tile), -(-LENGTH // block)
    indices = torch.rand(BATCH, GROUPS, tiles, width, generator=draw).argsort(-1).int()
    counts = torch.randint(1, width // 2 + 2, (BATCH, GROUPS, tiles), generator=draw).int()
    return Blocks(indices, counts, block, tile)


def blocks_forward_backward() -> None:
    attend(some_blocks(), LENGTH, gradients=True)
    attend(some_blocks() & a_padding(), 77, gradients=True, biased=False)


def dynamic() -> None:
    settings = Dynamic(tile=16, block=8, near=10, landmarks=4, shortest=32, few=4, coverage=0.9)
    for dtype, dim in KINDS:
        q = random(BATCH, HEADS, LENGTH, dim, seed=1, dtype=dtype).to(DEVICE)
        k, v = (random(BATCH, GROUPS, LENGTH, dim, seed=s, dtype=dtype).to(DEVICE) for s in (2, 3))
        with torch.no_grad():
            out, ran = dynamic_attention(q, k, v, settings, impl="triton")
        assert ran.impl == "triton"
        assert int(ran.shown) < ran.causal
        # Which blocks are kept may depend on rounding.
        assert out.isfinite().all()


def pages() -> None:
    """A decode step that chooses blocks from keys in 4 bits."""
    settings = Dynamic(tile=16, block=8, near=10, landmarks=4, shortest=32, few=4, coverage=0.9)
    for dtype, dim in KINDS:
        q = random(BATCH, HEADS, 1, dim, seed=1, dtype=dtype).to(DEVICE)
        k, v = (random(BATCH, GROUPS, LENGTH, dim, seed=s, dtype=dtype).to(DEVICE) for s in (2, 3))
        paged = PagedKeys(settings, quantized=True)
        paged.append(k, v)
        out, causal, shown, _ = paged.attend(q)
        assert shown is not None
        assert int(shown) < causal
        assert out.isfinite().all()


def importance_of_blocks() -> None:
    """What native sparse attention chooses blocks by."""
    lengths = {"block": 8, "stride": 4, "select_block": 16}
    for dtype, dim in KINDS:
        q = random(BATCH, HEADS, 77, dim, seed=1, dtype=dtype)
        keys = random(BATCH, GROUPS, 1 + LENGTH // 4, dim, seed=2, dtype=dtype)
        wanted = importance(q.double(), keys.double(), LENGTH, **lengths)
        found = block_importance(q.to(DEVICE), keys.to(DEVICE), LENGTH, *lengths.values())
        same(found, wanted, close=1e-3)


def kernels_for_all() -> None:
    """Let dynamic masks use their kernels on the CPU too, in the interpreter."""

    def by_kernels(x: Tensor, name: str, **given: Any) -> Callable[..., Any]:
        home = importlib.import_module("dynmask.dam.kernels")
        found: Callable[..., Any] = getattr(importlib.import_module(home._MODULES[name]), name)
        return found

    for name, module in list(sys.modules.items()):
        if name.startswith("dynmask.dam") and hasattr(module, "by_kernels"):
            module.by_kernels = by_kernels  # type: ignore[attr-defined]


CALLS = {
    call.__name__: call
    for call in (
        select,
        schedule_forward_backward,
        spans,
        decode,
        insert,
        stripes_forward_backward,
        stripes_decode,
        blocks_forward_backward,
        dynamic,
        pages,
        importance_of_blocks,
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(CALLS), choices=CALLS)
    parser.add_argument("--launched", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    note_launches()
    if not GPU:
        kernels_for_all()
    # On short inputs too, work is shared out over programs whose sums are added.
    blocks_backward._LEAST_ROWS = stripes_backward._LEAST_ROWS = 32
    wrong = 0
    for name in given.only:
        try:
            CALLS[name]()
            if GPU:
                torch.cuda.synchronize()
            print(f"CALL {name} ok", flush=True)
        except Exception:
            wrong += 1
            print(f"CALL {name} wrong\n{traceback.format_exc(limit=-3)}", flush=True)
        if given.launched is not None:
            given.launched.write_text(json.dumps(sorted(LAUNCHED)), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
