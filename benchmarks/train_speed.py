"""Training speed of a DMA model against the same model with dense attention, on one device.

    python benchmarks/train_speed.py --out FILE [--sizes 80M 1.7B] [--lengths 2048 8192 32768]
        [--rounds 10] [--minutes 8]

A step is forward pass, backward pass and a step of fused AdamW, in bf16 with fp32 weights, on
32,768 random tokens, as `dynmask train` computes it: layers and loss under torch.compile,
activations recomputed from 1B parameters on. The dense model is transformers' Qwen3 of the same
shape with torch's causal SDPA, flash and cuDNN each. All variants share one set of weights and one
optimizer, so they fit beside each other and take turns, round by round. The vocabulary has 32,768
entries in every size, or the logits would be most of the memory.

Before a cell is timed, at 256 tokens, where DMA with equal scores is dense attention, all variants
must give one loss. Weights and tokens are random, so what a row keeps is too.

Cells that FILE holds already are not measured again; with --minutes no cell is begun after that
time, and the same command goes on. `--device cpu` shows on a tiny model that this runs, no more.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

from dynmask.bench import dense
from dynmask.bench.environment import ceilings, clocks, environment
from dynmask.bench.results import FORMAT, VERSION, load
from dynmask.bench.timing import Clock, Run, measure, peak_memory, ratio
from dynmask.dma import DmaConfig, DmaForCausalLM
from dynmask.train.flops import flops_per_token
from dynmask.train.trainer import weighted_loss

VOCABULARY = 32_768
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
RECOMPUTE_FROM = 1_000_000_000


def configuration(size: str, keep: int, longest: int) -> DmaConfig:
    changes = {"keep": keep, "max_position_embeddings": longest, "tie_word_embeddings": True}
    if size == "tiny":
        return DmaConfig(**TINY, **changes)
    return DmaConfig.named(size, **changes, vocab_size=VOCABULARY)


def attend_with(backend: str, device: torch.device) -> dense.Attend:
    """Return one of torch's causal kernels, as a call that names it.

    `sdpa_kernel` is a global setting, which compiled code would keep from the variant that ran
    first; so on a GPU the operators are called that torch's function would choose.
    """
    if device.type == "cpu":
        return dense.causal(device)[backend]
    aten = torch.ops.aten
    if backend == "flash":
        return lambda q, k, v: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    assert backend == "cudnn"
    return lambda q, k, v: aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)[
        0
    ]


def dense_model(config: DmaConfig, backend: str, device: torch.device) -> Qwen3ForCausalLM:
    """Qwen3 of the same shape whose attention is one of torch's causal kernels."""
    attend = attend_with(backend, device)

    def attention(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None
        assert kwargs.get("scaling") in (None, module.head_dim**-0.5)
        # Norms and RoPE give fp32 under autocast, and autocast does not know the operators by name.
        query, key = query.to(value.dtype), key.to(value.dtype)
        return attend(query, key, value).transpose(1, 2), None

    # transformers takes every name with "flash" in it for a package to load.
    known_as = f"dense_{backend}".replace("flash", "fa")
    AttentionInterface.register(known_as, attention)
    names = (*TINY, "head_dim", "rms_norm_eps", "max_position_embeddings", "rope_parameters")
    fields = {name: getattr(config, name) for name in names}
    shape = Qwen3Config(**fields, tie_word_embeddings=True, use_cache=False)
    shape._attn_implementation = known_as
    with torch.device("meta"):
        model = Qwen3ForCausalLM(shape)
    # The rotary table is no parameter, and meta has no values.
    model.model.rotary_emb = type(model.model.rotary_emb)(shape).to(device)
    return model


def share(model: torch.nn.Module, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Give a model the parameters of another, by name."""
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        parent, _, last = name.rpartition(".")
        source = "model.embed_tokens.weight" if name == "lm_head.weight" else name
        setattr(model.get_submodule(parent), last, parameters[source])


class Variants:
    """Models of one size on shared weights, and their steps."""

    def __init__(self, size: str, keep: int, longest: int, device: torch.device):
        torch.manual_seed(0)
        self.device = device
        with device:
            dma = DmaForCausalLM(configuration(size, keep, longest))
        parameters = dict(dma.named_parameters())
        self.models: dict[str, Any] = {"dma": dma}
        for backend in dense.causal(device):
            self.models[backend] = dense_model(dma.config, backend, device)
            share(self.models[backend], parameters)
        self.recompute = dma.num_parameters() >= RECOMPUTE_FROM
        for model in self.models.values():
            model.train()
            if self.recompute:
                enable = getattr(model, "activation_checkpointing_enable", None)
                (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
            if device.type == "cuda":
                for layer in model.model.layers:
                    layer.compile()
        self.loss = torch.compile(weighted_loss) if device.type == "cuda" else weighted_loss
        self.optimizer = torch.optim.AdamW(dma.parameters(), lr=1e-5, fused=True)

    def forward(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        on_gpu = self.device.type == "cuda"
        weights = torch.ones(ids.shape, device=self.device)
        norm = weights[:, 1:].sum()
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
            logits = self.models[name](input_ids=ids, use_cache=False).logits
            return self.loss(logits, ids, weights, norm)

    def step(self, name: str, ids: torch.Tensor) -> None:
        self.forward(name, ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.compiler.set_stance("force_eager")
    def gate(self) -> dict[str, float]:
        """Return the loss of each variant where they compute the same; raise if they do not."""
        size = self.models["dma"].config.vocab_size
        ids = torch.randint(size, (2, 256), device=self.device)
        strengths = [layer.self_attn.score.A for layer in self.models["dma"].model.layers]
        before = [strength.detach().clone() for strength in strengths]
        keep = self.models["dma"].config.keep
        self.models["dma"].config.keep = 256
        with torch.no_grad():
            for strength in strengths:
                strength.zero_()  # equal scores: a constant that softmax does not notice
            losses = {name: float(self.forward(name, ids)) for name in self.models}
            for strength, value in zip(strengths, before, strict=True):
                strength.copy_(value)
        self.models["dma"].config.keep = keep
        if max(losses.values()) - min(losses.values()) > 1e-2:
            raise ValueError(f"the variants are not the same model: losses {losses}")
        return losses


def cell(
    variants: Variants, size: str, length: int, tokens: int, rounds: int, clock: Clock
) -> dict[str, Any]:
    device, config = variants.device, variants.models["dma"].config
    ids = torch.randint(config.vocab_size, (tokens // length, length), device=device)
    steps = {name: partial(variants.step, name, ids) for name in variants.models}
    torch._dynamo.reset()  # or a second length would be compiled for any length
    failed = {}
    for name, step in list(steps.items()):
        try:
            step()
        except Exception as error:  # a dense kernel may not run here; the others still count
            if name == "dma" or len(steps) == 2:
                raise
            failed[name] = f"{type(error).__name__}: {error}"[:500]
            variants.optimizer.zero_grad(set_to_none=True)
            del steps[name]
    times = measure(
        {name: Run(step) for name, step in steps.items()},
        clock,
        rounds=rounds,
        warmups=3,
        budget=30,
    )
    clock.release()
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    peaks = {name: peak_memory(step, device) for name, step in steps.items()}
    best = dense.fastest({name: times[name] for name in times if name != "dma"})
    flops = {name: flops_per_token(variants.models[name], length) for name in steps}
    return {
        "size": size,
        "length": length,
        "score": "initial",
        "status": "ok",
        "rows": tokens // length,
        "parameters": variants.models["dma"].num_parameters(),
        "recompute": variants.recompute,
        "times": {name: time.to_dict() for name, time in times.items()},
        "tokens_per_second": {name: tokens / time.median for name, time in times.items()},
        "useful_flops": {name: flops[name] * tokens / times[name].median for name in times},
        "fastest": best,
        "failed": failed,
        "ratio": ratio(times[best], times["dma"]),
        "peak_bytes": {n: None if peak is None else held + peak for n, peak in peaks.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", help="80M, 200M, 680M, 1.7B; default 80M and 1.7B")
    parser.add_argument("--lengths", type=int, nargs="+", help="default 2048 8192 32768")
    parser.add_argument("--keep", type=int, help="keys that a row keeps; default 1024")
    parser.add_argument("--tokens", type=int, help="of a step; default 32768")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--minutes", type=float, help="begin no cell after that long")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    sizes = args.sizes or (["80M", "1.7B"] if on_gpu else ["tiny"])
    lengths = args.lengths or ([2048, 8192, 32768] if on_gpu else [128, 256])
    settings = {
        "dtype": "bfloat16" if on_gpu else "float32",
        "keep": args.keep or (1024 if on_gpu else 64),
        "tokens": args.tokens or (32768 if on_gpu else 512),
        "rounds": args.rounds,
        "device": args.device,
    }
    if wrong := [length for length in lengths if settings["tokens"] % length]:
        parser.error(f"--lengths {wrong} must divide --tokens {settings['tokens']}")
    start, device = time.monotonic(), torch.device(args.device)
    clock = Clock(device)
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "benchmark": "train_speed",
        "complete": False,
        **environment(args.device),
        "impl": "auto",
        "settings": settings,
        "ceilings": {},
        "cells": [],
    }
    if args.out and args.out.exists():
        kept = load(args.out)
        here = document["device"]["name"]
        if kept["settings"] != settings or kept["device"]["name"] != here:
            parser.error(f"--out {args.out}: other settings or another device; give another file")
        document |= {"cells": kept["cells"], "ceilings": kept["ceilings"]}
    if not document["ceilings"]:
        with torch.no_grad():
            document["ceilings"] = ceilings(clock)
        clock.release()
    wanted = [(size, length) for size in sizes for length in sorted(lengths)]
    for size in sizes:
        variants = None
        for length in sorted(lengths):
            done = {(c["size"], c["length"]) for c in document["cells"] if c["status"] == "ok"}
            late = args.minutes is not None and time.monotonic() - start > 60 * args.minutes
            if (size, length) in done or late:
                continue
            try:
                if variants is None:
                    variants = Variants(size, settings["keep"], max(lengths), device)
                    losses = variants.gate()
                one = cell(variants, size, length, settings["tokens"], args.rounds, clock)
                one["gate_losses"] = losses
            except Exception as error:  # a kernel can fail to compile, to launch or to find memory
                one = {"size": size, "length": length, "score": None, "status": "error"}
                one["error"] = f"{type(error).__name__}: {error}"
            one["clocks"] = clocks(args.device)
            document["cells"] = [
                c for c in document["cells"] if (c["size"], c["length"]) != (size, length)
            ] + [one]
            document["complete"] = {
                (c["size"], c["length"]) for c in document["cells"] if c["status"] == "ok"
            } >= set(wanted)
            if args.out:
                args.out.write_text(json.dumps(document, indent=1) + "\n")
            print(line(one), flush=True)
            # After an error the traceback's frames hold tensors.
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
        variants = None
        gc.collect()
        torch._dynamo.reset()
        if on_gpu:
            torch.cuda.empty_cache()


def line(one: dict[str, Any]) -> str:
    words = f"{one['size']:>5} {one['length']:>6}"
    if one["status"] != "ok":
        return f"{words} {one['error']}"
    speed = "  ".join(f"{n} {s:,.0f}" for n, s in one["tokens_per_second"].items())
    peak = "  ".join(f"{n} {b / 2**30:.1f}" for n, b in one["peak_bytes"].items() if b)
    low, middle, high = (one["ratio"][name] for name in ("low", "median", "high"))
    text = f"{words}  {middle:.2f}x ({low:.2f} to {high:.2f}) of {one['fastest']}; tokens/s {speed}"
    return f"{text}; GiB {peak}" if peak else text


if __name__ == "__main__":
    main()
