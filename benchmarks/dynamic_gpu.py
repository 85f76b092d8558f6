"""Time dynamic masks against torch's dense causal kernels on a GPU: the op, and whole models.

    python benchmarks/dynamic_gpu.py --model FOLDER [--lengths 8192 32768 65536 131072]
        [--shapes 1B 3B 8B] [--steps 1 8] [--coverage 0.975] [--rounds 10]
        [--models 1B 8B] [--model-lengths 32768 131072] [--alone 1048576] [--density 0.1]
        [--out FILE.json]

Op: bfloat16, heads of the shapes named: Llama-3.2-1B's (32 on 8 key heads, D 64), Llama-3.2-3B's
(24 on 8, D 128) and Llama-3.1-8B's (32 on 8, D 128). Queries, keys and values are those of the
model in FOLDER (a dense Llama with 4 query heads a key head and D 64), from as many of its layers
as 8 key heads take, on the package's texts, read in windows of the model's context at their places
in the long text, so that positions run on. For D 128 each vector stands beside itself and queries
are divided by the square root of 2, which leaves the attention maps as they are; 24 heads are three
of each four. Everything is timed: landmarks, costs, choice, lists, attention. `selection` is the
time of all but attention, by events inside the call.

Steps: one row of decoding at the end of the same keys, in batches of so many copies: its key and
value are written into `dynmask.dam.paged.PagedKeys`, blocks are chosen and attended to. Beside it
torch's dense kernels over a cache that has them already, and over one that is copied to take them
in, as transformers' DynamicCache does (`copied`).

Whole models: these shapes with random weights, a prompt of random tokens, time to the last token's
logits, one call. Random weights have flat attention maps, which ask for no block at all: the
selection runs as always, and random blocks of --density are kept instead. At lengths after --alone
only dynamic masks run.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import dynmask
from dynmask.assets import load_texts, load_tokenizer
from dynmask.bench import dense
from dynmask.bench.environment import environment
from dynmask.bench.timing import Clock, Run, Times, measure, peak_memory, ratio
from dynmask.dam.dynamic import Dynamic, dynamic_attention
from dynmask.dam.paged import PagedKeys, Step

HEADS, GROUPS, DIM = 32, 8, 64
OPS = {"1B": (32, 64), "3B": (24, 128), "8B": (32, 128)}
"""Query heads and head size."""
SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}


class Events(AbstractContextManager[None]):
    """Adds up the device's time inside with blocks."""

    def __init__(self) -> None:
        self.pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        self.pairs.append(tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)))
        self.pairs[-1][0].record()

    def __exit__(self, *_: object) -> None:
        self.pairs[-1][1].record()

    def seconds(self) -> float:
        torch.cuda.synchronize()
        return sum(a.elapsed_time(b) for a, b in self.pairs) / 1e3


def taken_from(folder: str, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the q, k and v of a trained model for a text of ``length`` tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    config = model.config
    ratio_, groups = HEADS // GROUPS, config.num_key_value_heads
    if config.head_dim != DIM or config.num_attention_heads // groups != ratio_:
        raise SystemExit(f"--model must have D {DIM} and {ratio_} query heads a key head")
    count = GROUPS // groups
    layers = [(2 * i + 1) * config.num_hidden_layers // (2 * count) for i in range(count)]
    found: list[list[Tensor]] = [[], [], []]

    def keep(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
        if module.layer_idx in layers:
            for kept, t in zip(found, (q, k, v), strict=True):
                kept.append(t)
        return sdpa(module, q, k, v, *args, **options)

    sdpa = AttentionInterface()["sdpa"]
    AttentionInterface.register("kept", keep)
    model.set_attn_implementation("kept")
    ids = load_tokenizer()("\n".join(load_texts("haystack"))).input_ids
    ids = torch.tensor(ids).repeat(length // len(ids) + 1)[None, :length].cuda()
    window = config.max_position_embeddings
    parts: list[list[Tensor]] = [[], [], []]
    for first in range(0, length, window):
        part = ids[:, first : first + window]
        at = torch.arange(first, first + part.shape[1], device="cuda")[None]
        for kept in found:
            kept.clear()
        with torch.no_grad():
            model(part, position_ids=at, use_cache=False, logits_to_keep=1)
        for kept, made in zip(parts, found, strict=True):
            kept.append(torch.cat(made, 1))
    return tuple(torch.cat(kept, 2).contiguous() for kept in parts)  # type: ignore[return-value]


def shaped(q: Tensor, k: Tensor, v: Tensor, shape: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return vectors with the same attention maps in another shape."""
    heads, dim = OPS[shape]
    times = dim // DIM
    q = q.unflatten(1, (GROUPS, -1))[:, :, : heads // GROUPS].flatten(1, 2)
    return (q * times**-0.5).repeat(1, 1, 1, times), *(t.repeat(1, 1, 1, times) for t in (k, v))


def op(
    folder: str,
    lengths: list[int],
    shapes: list[str],
    batches: list[int],
    settings: Dynamic,
    rounds: int,
) -> list[dict[str, Any]]:
    clock, cells = Clock(torch.device("cuda")), []
    every = taken_from(folder, max(lengths))
    for length, shape in product(lengths, shapes):
        cut = shaped(*(t[:, :, :length] for t in every), shape)
        named = {"shape": shape, "length": length}
        cells.append({"part": "op"} | named | cell(*cut, settings, rounds, clock))
        show(cells[-1])
        for batch in batches:
            copies = (t.repeat(batch, 1, 1, 1) for t in cut)
            part = {"part": f"step, batch {batch}"}
            cells.append(part | named | step(*copies, settings, rounds, clock))
            show(cells[-1])
    return cells


def cell(
    q: Tensor, k: Tensor, v: Tensor, settings: Dynamic, rounds: int, clock: Clock
) -> dict[str, Any]:
    attend = dense.causal(q.device)
    exact = attend["flash"](q, k, v)
    out, ran = dynamic_attention(q, k, v, settings)
    error = float((out.float() - exact.float()).norm() / exact.float().norm())
    runs = {name: Run(partial(f, q, k, v)) for name, f in attend.items()}
    runs["dynamic"] = Run(partial(dynamic_attention, q, k, v, settings))
    times = measure(runs, clock, rounds=rounds, warmups=4, budget=1.0)
    selection = []
    for _ in range(5):
        events = Events()
        # Launches are queued meanwhile, as in a model.
        torch.cuda._sleep(50_000_000)
        dynamic_attention(q, k, v, settings, clock=events)
        selection.append(events.seconds())
    best = dense.fastest({name: times[name] for name in attend})
    return {
        "density": int(ran.shown) / ran.causal,
        "distance": error,
        "times": {name: t.to_dict() for name, t in times.items()},
        "selection": Times.of(selection).to_dict(),
        "fastest": best,
        "speedup": ratio(times[best], times["dynamic"]),
        "peak": peak_memory(runs["dynamic"], q.device),
        "peak_flash": peak_memory(runs["flash"], q.device),
    }


def step(
    q: Tensor, k: Tensor, v: Tensor, settings: Dynamic, rounds: int, clock: Clock
) -> dict[str, Any]:
    # Off the end of a block, as 63 steps of 64 are.
    q, k, v = (t[:, :, : -settings.block // 2].contiguous() for t in (q, k, v))
    q, new_k, new_v = (t[:, :, -1:].contiguous() for t in (q, k, v))
    old_k, old_v = (t[:, :, :-1].contiguous() for t in (k, v))
    paged = PagedKeys(settings)
    paged.append(old_k, old_v)

    def take() -> Step:
        paged.append(new_k, new_v)
        done = paged.attend(q)
        paged.crop(1)
        return done

    def copied() -> Tensor:
        grown = torch.cat([old_k, new_k], 2), torch.cat([old_v, new_v], 2)
        return scaled_dot_product_attention(q, *grown, enable_gqa=True)

    attend = dense.causal(q.device)
    first = next(iter(attend))
    exact, done = attend[first](q, k, v).float(), take()
    runs = {name: Run(partial(f, q, k, v)) for name, f in attend.items()}
    runs |= {"copied": Run(copied), "dynamic": Run(take)}
    times = measure(runs, clock, rounds=rounds, warmups=4, budget=1.0)
    best = dense.fastest({name: times[name] for name in attend})
    return {
        "density": 1.0 if done.shown is None else int(done.shown) / done.causal,
        "distance": float((done.out.float() - exact).norm() / exact.norm()),
        "impl": done.impl,
        "times": {name: t.to_dict() for name, t in times.items()},
        "fastest": best,
        "speedup": {name: ratio(times[name], times["dynamic"]) for name in (best, "copied")},
        "cache": paged.nbytes / (k.nbytes + v.nbytes),
    }


def keep_at_random(density: float) -> None:
    """Have the selection run, and keep random blocks instead of what it chose."""
    from dynmask.dam.triton import keep as module

    real = module.keep

    def keep(cost: Tensor, far: Tensor, allowed: float) -> Tensor:
        kept = real(cost, far, allowed)
        chosen = torch.rand(kept.shape, device=kept.device) < density
        return chosen & (torch.arange(kept.shape[3], device=kept.device) < far[:, None])

    module.keep = keep


def whole(
    name: str, lengths: list[int], alone: list[int], settings: Dynamic, rounds: int
) -> Iterator[dict[str, Any]]:
    heads, dim = OPS[name]
    config = LlamaConfig(
        **SHAPES[name],
        num_attention_heads=heads,
        num_key_value_heads=GROUPS,
        head_dim=dim,
        vocab_size=128256,
        max_position_embeddings=1 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=name == "1B",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    clock = Clock(torch.device("cuda"))
    for length in lengths + alone:
        ids = torch.randint(0, 128256, (1, length), device="cuda")
        read = partial(read_prompt, model, ids)
        times, peaks = {}, {}
        for kind in ("dynamic",) if length in alone else ("cudnn", "flash", "dynamic"):
            with ExitStack() as stack:
                if kind == "dynamic":
                    run = stack.enter_context(dynmask.accelerate(model, dynamic=settings))
                else:
                    stack.enter_context(sdpa_kernel(SDPA[kind]))
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                times |= measure({kind: Run(read)}, clock, rounds=rounds, warmups=1, budget=2.0)
                peaks[kind] = torch.cuda.max_memory_allocated() - before
                if kind == "dynamic":
                    density = run.stats()["density"]["prefill"]
            gc.collect()
            torch.cuda.empty_cache()
        yield {
            "part": "model",
            "shape": name,
            "length": length,
            "density": density,
            "times": {k: t.to_dict() for k, t in times.items()},
            "speedup": {k: ratio(times[k], times["dynamic"]) for k in times if k != "dynamic"},
            "peaks": peaks,
        }


def read_prompt(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, logits_to_keep=1, use_cache=True).logits


def show(cell: dict[str, Any]) -> None:
    times = {k: round(t["median"] * 1e3, 2) for k, t in cell["times"].items()}
    ours = cell["times"]["dynamic"]["median"]
    share = f" selection {cell['selection']['median'] / ours:.0%}" if "selection" in cell else ""
    extra = f" distance {cell['distance']:.4f}" if "distance" in cell else ""
    print(
        f"{cell['part']} {cell['shape']} {cell['length']} density {cell['density']:.3f}",
        f"ms {times}{share}{extra}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a trained model; without it no op is timed")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 65536, 131072])
    parser.add_argument("--shapes", nargs="+", choices=list(OPS), default=["1B"])
    parser.add_argument("--steps", type=int, nargs="*", default=[], help="batches of decode steps")
    parser.add_argument("--coverage", type=float, default=Dynamic().coverage)
    parser.add_argument("--models", nargs="*", choices=list(SHAPES), default=[])
    parser.add_argument("--model-lengths", type=int, nargs="*", default=[32768, 131072])
    parser.add_argument("--alone", type=int, nargs="*", default=[], help="further lengths")
    parser.add_argument("--density", type=float, default=0.1, help="blocks kept in whole models")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    settings = Dynamic(coverage=args.coverage)
    cells = []
    if args.model:
        cells = op(args.model, args.lengths, args.shapes, args.steps, settings, args.rounds)
    where = environment(torch.device("cuda"))
    result: dict[str, Any] = {"environment": where, "coverage": args.coverage, "cells": cells}

    def write() -> None:
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")

    write()
    if args.models:
        keep_at_random(args.density)
    for name in args.models:
        for made in whole(name, args.model_lengths, args.alone, settings, args.rounds):
            show(made)
            cells.append(made | {"kept": args.density})
            write()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
