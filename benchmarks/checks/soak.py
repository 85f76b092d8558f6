"""Thousands of decode steps in a row: caches keep their promises, and memory stays flat.

python benchmarks/checks/soak.py --out benchmarks/results/soak_cpu.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from dynmask import accelerate
from dynmask.dma import DmaConfig, DmaForCausalLM, LifetimeCache
from dynmask.report.machine import machine, versions

VOCAB, LAYERS, HEADS = 97, 2, 2
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2 * HEADS,
    "num_key_value_heads": HEADS,
    "pad_token_id": 0,
    "eos_token_id": None,
    # Sharp maps: at the usual 0.02 all keys would look alike.
    "initializer_range": 0.3,
}
SINKS, RECENT = 4, 64  # What a capped cache promises to keep.
# What may come between the quarters: an allocator's whims, and on a GPU none.
TOLERANCE_MIB = {"cpu": 16.0, "cuda": 1.0}


class Broken(Exception):
    """A promise that was not kept."""


def expect(condition: bool, promise: str) -> None:
    if not condition:
        raise Broken(promise)


def sizes(steps: int) -> dict[str, Any]:
    return {**SIZES, "max_position_embeddings": 4096 + steps}


def tokens(draw: torch.Generator, count: int, device: str) -> Tensor:
    # Random ones: greedy tokens fall into a loop.
    return torch.randint(3, VOCAB, (1, count), generator=draw).to(device)


def lifetimes(steps: int, device: str, draw: torch.Generator) -> Iterator[Callable[[], None]]:
    """A DMA model: each head keeps the best scores of all tokens, in order on the CPU."""
    keep, prompt = 64, 300
    config = DmaConfig(keep=keep, **sizes(steps))
    model = DmaForCausalLM(config).eval().to(device)
    for name, weight in model.named_parameters():
        if name.endswith("score.A"):
            torch.nn.init.normal_(weight)
    cache = LifetimeCache(config)
    extend, last = cache.extend, {}
    scores = torch.full((LAYERS, HEADS, prompt + steps), -torch.inf, device=device)

    def noting(k: Tensor, v: Tensor, score: Tensor, layer: int, **given: Any) -> Any:
        seen = cache.get_seq_length(layer)
        scores[layer, :, seen : seen + k.shape[2]] = score[0].float()
        last[layer] = extend(k, v, score, layer, **given)
        return last[layer]

    cache.extend = noting  # type: ignore[method-assign]
    logits = model(tokens(draw, prompt, device), past_key_values=cache).logits
    held, seen = None, prompt

    def check() -> None:
        nonlocal held
        expect(bool(logits.isfinite().all()), "logits are finite")
        held = cache.memory() if held is None else held
        expect(cache.memory() == held, "memory() does not change")
        for layer, (k, v, bias, _) in last.items():
            expect(k.shape[2] == v.shape[2] == keep, "keep keys a head")
            expect(bool(k.isfinite().all() and v.isfinite().all()), "kept keys are finite")
            # Equal tokens have equal scores in the first layer: the earlier ones stay.
            best = scores[layer].sort(descending=True, stable=True).indices[:, :keep]
            in_order = scores[layer].gather(1, best.sort().values)
            found, wanted = bias[0], in_order
            if device != "cpu":  # Slots are in no order there.
                found, wanted = bias[0].sort().values, in_order.sort().values
            expect(torch.equal(found, wanted), "the best scores of all tokens, by arrival")

    for _ in range(steps):
        logits = model(tokens(draw, 1, device), past_key_values=cache).logits
        seen += 1
        expect(cache.get_seq_length() == seen, "a token a step")
        yield check


def capped(steps: int, device: str, draw: torch.Generator) -> Iterator[Callable[[], None]]:
    """A capped cache: never over the cap, what is kept stays in order, ends of it always."""
    cap, prompt = 256, 600
    model = LlamaForCausalLM(LlamaConfig(**sizes(steps))).eval().to(device)
    with accelerate(model) as run:
        cache = run.cache(cap)
        logits = model(tokens(draw, prompt, device), past_key_values=cache).logits
        first = [layer.keys[:, :, :SINKS].clone() for layer in cache.layers]
        seen, evictions = prompt, 0

        def check() -> None:
            expect(bool(logits.isfinite().all()), "logits are finite")
            for layer, sinks in zip(cache.layers, first, strict=True):
                finite = layer.keys.isfinite().all() and layer.values.isfinite().all()
                expect(bool(finite), "kept keys are finite")
                expect(torch.equal(layer.keys[:, :, :SINKS], sinks), "the first tokens stay")

        for _ in range(steps):
            before = [layer.keys for layer in cache.layers]
            logits = model(tokens(draw, 1, device), past_key_values=cache).logits
            seen += 1
            expect(cache.get_seq_length() == seen, "a token a step")
            for layer, old in zip(cache.layers, before, strict=True):
                expect(layer.keys.shape[2] <= cap, "never more slots than the cap")
                if layer.keys.shape[2] <= old.shape[2]:
                    evictions += 1
                    check_order(old, layer.keys[:, :, :-1])
            yield check
        calls = run.stats()["calls"]
    expect(evictions >= LAYERS * (steps // cap), "keys are given up again and again")
    expect(calls == {"prefill": LAYERS, "decode": LAYERS * steps}, "every call is counted")


def check_order(old: Tensor, new: Tensor) -> None:
    """Hold ``new [1, G, n, D]`` to be rows of ``old [1, G, S, D]`` in their order, the last too."""
    same = (new[0, :, :, None] == old[0, :, None]).all(-1)
    place = same.int().argmax(-1)
    expect(bool(same.any(-1).all()), "kept keys are those that were there")
    expect(bool((place.diff(dim=-1) > 0).all()), "kept keys stay in order")
    recent = torch.arange(old.shape[2] - RECENT, old.shape[2], device=old.device)
    expect(bool((place[:, -RECENT:] == recent).all()), "the last tokens stay")


def dynamic(steps: int, device: str, draw: torch.Generator) -> Iterator[Callable[[], None]]:
    """Dynamic masks: prompts of ever other lengths, each with an ordinary cache of its own."""
    model = LlamaForCausalLM(LlamaConfig(**sizes(steps))).eval().to(device)
    done, prompts = 0, 0
    with accelerate(model, coverage=0.9) as run:
        while done < steps:
            cache, prompts = DynamicCache(config=model.config), prompts + 1
            seen = int(torch.randint(1024, 2048, (), generator=draw))
            logits = model(tokens(draw, seen, device), past_key_values=cache).logits
            expect(bool(logits.isfinite().all()), "logits of the prompt are finite")
            for _ in range(min(100, steps - done)):
                logits = model(tokens(draw, 1, device), past_key_values=cache).logits
                done, seen = done + 1, seen + 1
                at = [layer.keys.shape[2] for layer in cache.layers]
                expect(at == [seen] * LAYERS == [cache.get_seq_length()] * LAYERS, "a key a token")

                def check(logits: Tensor = logits, cache: DynamicCache = cache) -> None:
                    finite = [layer.keys.isfinite().all() for layer in cache.layers]
                    expect(bool(logits.isfinite().all() and all(finite)), "all is finite")

                yield check
        stats = run.stats()
    expect(stats["calls"] == {"prefill": LAYERS * prompts, "decode": LAYERS * steps}, "counted")
    expect(0 < stats["density"]["prefill"] < 1, "the masks leave something out")


CASES = {case.__name__: case for case in (lifetimes, capped, dynamic)}


def held_mib(device: str) -> float:
    """Return the process's resident memory, or on a GPU what torch has allocated there."""
    gc.collect()
    if device != "cpu":
        return torch.cuda.memory_allocated() / 2**20
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(
    name: str, steps: int, every: int, device: str, seed: int, *, tolerance: float
) -> dict[str, Any]:
    """Run one case, and return what was found."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    started, readings, ran, broken = time.perf_counter(), [], 0, None
    try:
        with torch.inference_mode():
            for check in CASES[name](steps, device, draw):
                ran += 1
                if ran % every == 0:
                    check()
                    readings.append(round(held_mib(device), 3))
    except Broken as error:
        broken = str(error)
    quarter = max(1, len(readings) // 4)
    grown = max(readings[-quarter:], default=0.0) - max(readings[:quarter], default=0.0)
    if broken is None and grown > tolerance:
        broken = "memory stays flat"
    return {
        "promise": CASES[name].__doc__,
        "ok": broken is None,
        "broken": broken,
        "steps": ran,
        "checks": len(readings),
        "seconds": round(time.perf_counter() - started, 1),
        "memory": "resident" if device == "cpu" else "torch.cuda.memory_allocated",
        "first_quarter_mib": max(readings[:quarter], default=None),
        "last_quarter_mib": max(readings[-quarter:], default=None),
        "grown_mib": round(grown, 3),
        "readings_mib": readings,
    }


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=250, help="steps between two checks")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance-mib", type=float, help="growth that is no leak: 16, GPU 1")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(words)
    tolerance = given.tolerance_mib
    if tolerance is None:
        tolerance = TOLERANCE_MIB["cpu" if given.device == "cpu" else "cuda"]
    found: dict[str, Any] = {}
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "device": given.device,
        "steps": given.steps,
        "every": given.every,
        "seed": given.seed,
        "tolerance_mib": tolerance,
        "cases": found,
    }
    for name in given.cases:
        options = given.steps, given.every, given.device, given.seed
        found[name] = soak(name, *options, tolerance=tolerance)
        print(name, {k: v for k, v in found[name].items() if k != "readings_mib"}, flush=True)
        if given.out is not None:  # After each case: what has run is kept.
            given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))
    return 0 if all(case["ok"] for case in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
