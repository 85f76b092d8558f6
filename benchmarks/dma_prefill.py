"""Prefill up to a million tokens through a DMA model whose cache stays small, beside a dense one.

    python benchmarks/dma_prefill.py [--lengths 65536 131072 ...] [--chunk 32768] [--out FILE]
    python benchmarks/dma_prefill.py --draw FILE PICTURE.svg

Random weights of Llama-3.2-1B's shape in bfloat16, batch 1. The DMA model (`keep` keys for each
kv head and layer) reads its prompt in chunks into a `LifetimeCache`; the dense one, transformers'
Llama with cuDNN's and with flash's causal SDPA, reads it at once, which is what it does fastest, as
far as `--dense-longest`. Then both go on token by token. Time is wall clock from the prompt to the
last token's logits, memory the most that was allocated, weights included.

Before anything is timed, the chunked prefill must give the last logits of a prefill at once.
"""

import argparse
import gc
import json
import time
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from dynmask.bench.dense import _CUDA as SDPA
from dynmask.bench.environment import environment
from dynmask.bench.timing import Times, ratio
from dynmask.dma import DmaConfig, DmaForCausalLM, LifetimeCache

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 1 << 20,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": True,
}
TINY = SHAPE | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def build(kind: type, config, device: str):
    torch.manual_seed(0)
    with torch.device(device):
        model = kind(config)
    return model.to(torch.bfloat16 if device == "cuda" else torch.float32).eval()


def read(model, tokens, cache, chunk: int):
    """Return the last token's logits after reading the prompt into the cache."""
    for part in tokens.split(chunk, dim=1):
        logits = model(part, past_key_values=cache, logits_to_keep=1).logits
    return logits


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(make_cache, model, tokens, chunk: int, steps: int, rounds: int, device: str) -> dict:
    """Time prefill and `steps` single tokens after it."""
    prefill, step, peak = [], [], None
    for _ in range(rounds + 1):  # The first round compiles.
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        cache = make_cache()
        wait(device)
        begin = time.perf_counter()
        logits = read(model, tokens, cache, chunk)
        wait(device)
        prefill.append(time.perf_counter() - begin)
        if device == "cuda":
            peak = torch.cuda.max_memory_allocated()
        for _ in range(steps):
            begin = time.perf_counter()
            logits = model(logits[:, -1:].argmax(-1), past_key_values=cache).logits
            wait(device)
            step.append(time.perf_counter() - begin)
        held = memory_of(cache)
        del cache, logits
    return {
        "prefill": Times.of(prefill[1:]).to_dict(),
        "step": Times.of(step[steps:]).to_dict(),
        "peak_bytes": peak,
        "cache_bytes": held,
    }


def memory_of(cache) -> int:
    if isinstance(cache, LifetimeCache):
        return cache.memory()
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def check(model, vocabulary: int, length: int, chunk: int, device: str) -> float:
    """Return how far chunked prefill is from whole prefill, relative to the logits' size."""
    tokens = torch.randint(vocabulary, (1, length), device=device)
    whole = model(tokens, use_cache=False, logits_to_keep=1).logits.float()
    parts = read(model, tokens, LifetimeCache(model.config), chunk).float()
    error = float((parts - whole).norm() / whole.norm())
    if not error < 2e-2:
        raise SystemExit(f"chunked prefill differs from whole prefill: {error}")
    return error


def draw(source: Path, picture: Path) -> None:
    """Draw time and memory against the length."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    cells = json.loads(source.read_text())["cells"]
    with rc_context({"svg.hashsalt": "dynmask", "svg.fonttype": "path"}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        titles = ("time to the first token, s", "peak memory, GiB")
        for axes, title in zip(figure.subplots(1, 2), titles, strict=True):
            for name in dict.fromkeys(cell["model"] for cell in cells):
                own = [cell for cell in cells if cell["model"] == name]
                if title.startswith("time"):
                    values = [cell["prefill"]["median"] for cell in own]
                else:
                    values = [cell["peak_bytes"] / 2**30 for cell in own]
                lengths = [cell["length"] for cell in own]
                axes.plot(lengths, values, "-o" if name == "dma" else "--o", label=name)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            ticks = sorted({cell["length"] for cell in cells})
            axes.set_xticks(ticks, [f"{n >> 10}K" if n < 1 << 20 else "1M" for n in ticks])
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("tokens of the prompt")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        figure.savefig(picture, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << n for n in range(16, 21)])
    parser.add_argument("--dense-longest", type=int, default=1 << 18)
    parser.add_argument("--chunk", type=int, default=1 << 15)
    parser.add_argument("--keep", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draw", type=Path, nargs=2, metavar=("FILE", "PICTURE"))
    args = parser.parse_args()
    if args.draw:
        draw(*args.draw)
        return
    torch.set_grad_enabled(False)
    shape = SHAPE if args.device == "cuda" else TINY
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "draw")}
    result = {**environment(args.device), "shape": shape, "settings": settings}
    cells: list[dict] = []

    def note(cell: dict) -> None:
        cells.append(cell)
        peak = "" if cell["peak_bytes"] is None else f"{cell['peak_bytes'] / 2**30:6.2f} GiB"
        print(
            f"{cell['length']:>8} {cell['model']:<12} {cell['prefill']['median']:8.3f} s {peak} "
            f"cache {cell['cache_bytes'] / 2**20:8.1f} MiB "
            f"step {cell['step']['median'] * 1e3:6.2f} ms",
            flush=True,
        )
        if args.out:
            args.out.write_text(json.dumps({**result, "cells": cells}, indent=1) + "\n")

    def prompt(length: int) -> torch.Tensor:
        torch.manual_seed(length)
        return torch.randint(shape["vocab_size"], (1, length), device=args.device)

    model = build(DmaForCausalLM, DmaConfig(**shape, qk_norm=False, keep=args.keep), args.device)
    shortest = min(args.lengths)
    result["error"] = check(model, shape["vocab_size"], shortest, shortest // 4 + 3, args.device)
    for length in args.lengths:
        rounds = args.rounds if length < 1 << 19 else min(args.rounds, 2)
        how = (args.chunk, args.steps, rounds, args.device)
        cell = timed(lambda: LifetimeCache(model.config), model, prompt(length), *how)
        note({"length": length, "model": "dma", **cell})
    del model
    gc.collect()
    model = build(LlamaForCausalLM, LlamaConfig(**shape), args.device)
    backends = SDPA if args.device == "cuda" else {"math": torch.nn.attention.SDPBackend.MATH}
    for length in args.lengths:
        if length > args.dense_longest:
            break
        for name in [name for name in backends if name != "efficient"]:
            with torch.nn.attention.sdpa_kernel(
                [backends[name], torch.nn.attention.SDPBackend.MATH]
                if args.device == "cpu"
                else backends[name]
            ):
                how = (length, args.steps, min(args.rounds, 2), args.device)
                try:
                    cell = timed(DynamicCache, model, prompt(length), *how)
                except (RuntimeError, torch.OutOfMemoryError) as error:
                    print(f"{length} dense {name}: {str(error)[:200]}", flush=True)
                    continue
            note({"length": length, "model": f"dense {name}", **cell})
    ours = {c["length"]: c for c in cells if c["model"] == "dma"}
    for cell in cells:
        if cell["model"] != "dma":
            cell["ratio"] = ratio(
                Times(**cell["prefill"]), Times(**ours[cell["length"]]["prefill"])
            )
    if args.out:
        args.out.write_text(json.dumps({**result, "cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
