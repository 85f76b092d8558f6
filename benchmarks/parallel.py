"""How training and prefill of DMA models scale over the GPUs of one machine.

    torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py [--parts prefill train]
        [--length 262144] [--chunk 32768] [--sizes 80M 1.7B] [--sharing ddp fsdp] [--out FILE]

Each part is timed on one GPU, while the others wait, then on all, in one run; times are wall clock
of the slowest process between two synchronized points, medians with quartiles.

prefill: Llama-3.2-1B's shape with random weights in bfloat16, `keep` 2,048, one prompt of --length
tokens. Alone it is read into a `LifetimeCache` in chunks; together by `context_prefill`, each
process a chunk at a time. Efficiency is one GPU's time over P times theirs. Before, the last
logits of both must agree.

train: `dynmask train`'s step (as in train_speed.py: bf16 autocast over fp32 weights, compiled
layers and loss, fused AdamW, recomputation from 1B parameters on), 32,768 tokens in one sequence
for each process, replicated (DDP) and sharded (FSDP2). The work of a process stays the same, so
efficiency is one GPU's time over theirs. Before, the losses of the first process must agree.

`--device cpu` shows with gloo on tiny models that this runs, no more.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from dma_prefill import SHAPE, build, read
from dma_prefill import TINY as TINY_SHAPE
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from train_speed import RECOMPUTE_FROM, configuration

from dynmask.bench.environment import environment
from dynmask.bench.timing import Times
from dynmask.dma import DmaConfig, DmaForCausalLM, LifetimeCache
from dynmask.dma.parallel import context_prefill
from dynmask.train.trainer import weighted_loss


class Group:
    """The processes, and how they wait for each other without keeping a GPU busy."""

    def __init__(self, kind: str):
        place = int(os.environ["LOCAL_RANK"])
        self.device = torch.device(kind, place) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._host = dist.new_group(backend="gloo")

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(group=self._host)

    def times(self, run: Callable[[], Any], rounds: int, *, alone: bool) -> Times | None:
        """Time the slowest process; with ``alone`` the first one only runs, the others wait."""
        found = []
        for _ in range(rounds + 2):  # The first two compile.
            self.wait()
            begin = time.perf_counter()
            if not alone or self.rank == 0:
                run()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
            took = torch.tensor(time.perf_counter() - begin)
            dist.all_reduce(took, dist.ReduceOp.MAX, group=self._host)
            found.append(float(took))
        return Times.of(found[2:])

    def from_first(self, value: float) -> float:
        """Return the first process's number in all."""
        told = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(told, 0, group=self._host)
        return float(told)

    def free(self) -> None:
        gc.collect()
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def efficiency(alone: Times, together: Times, share: int) -> dict[str, Any]:
    """Return both times, and ``alone / (share together)`` with what the quartiles allow."""
    return {
        "alone": alone.to_dict(),
        "together": together.to_dict(),
        "efficiency": {
            "low": alone.low / together.high / share,
            "median": alone.median / together.median / share,
            "high": alone.high / together.low / share,
        },
    }


def prefill(group: Group, length: int, chunk: int, keep: int, rounds: int) -> dict[str, Any]:
    on_gpu = group.device.type == "cuda"
    shape = SHAPE if on_gpu else TINY_SHAPE
    # All processes draw the same weights and tokens.
    model = build(DmaForCausalLM, DmaConfig(**shape, qk_norm=False, keep=keep), group.device.type)
    torch.manual_seed(length)
    tokens = torch.randint(shape["vocab_size"], (1, length), device=group.device)

    @torch.no_grad()
    def alone() -> Tensor:
        return read(model, tokens, LifetimeCache(model.config), chunk)

    def together() -> Tensor:
        cache = None
        for part in tokens.split(group.size * chunk, dim=1):
            found = context_prefill(model, part, past_key_values=cache)
            cache = found.past_key_values
        return found.logits

    wanted, found = alone().float(), together().float()
    error = float((wanted - found).norm() / wanted.norm())
    if not error < 2e-2:
        raise SystemExit(f"prefill together differs from prefill alone: {error}")
    width = shape["head_dim"]
    number = torch.finfo(model.dtype).bits // 8
    a_key = shape["num_key_value_heads"] * (2 * width * number + 4)
    pieces = -(-length // (group.size * chunk))
    one = group.times(alone, rounds, alone=True)
    all_of_them = group.times(together, rounds, alone=False)
    return {
        "part": "prefill",
        "length": length,
        "chunk": chunk,
        "keep": keep,
        "error": error,
        "bytes_given_by_a_process": pieces * shape["num_hidden_layers"] * min(keep, chunk) * a_key,
        **efficiency(one, all_of_them, group.size),
    }


class Training:
    """A model, its optimizer and one step of it; shared over the processes or not."""

    def __init__(self, group: Group, size: str, length: int, keep: int, sharing: str | None):
        torch.manual_seed(0)
        self.device = group.device
        on_gpu = self.device.type == "cuda"
        with self.device:
            model: nn.Module = DmaForCausalLM(configuration(size, keep, length))
        self.parameters = model.num_parameters()  # type: ignore[operator]
        self.vocabulary = model.config.vocab_size  # type: ignore[union-attr]
        if self.parameters >= RECOMPUTE_FROM:
            enable: Any = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        layers: Any = model.model.layers  # type: ignore[union-attr]
        for layer in layers:
            if on_gpu:
                layer.compile()
            if sharing == "fsdp":
                fully_shard(layer)
        if sharing == "fsdp":
            fully_shard(model)
        elif sharing == "ddp":
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.model = model.train()
        self.loss = torch.compile(weighted_loss) if on_gpu else weighted_loss
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        torch.manual_seed(group.rank)
        self.ids = torch.randint(self.vocabulary, (1, length), device=self.device)
        self.weights = torch.ones(self.ids.shape, device=self.device)

    def step(self) -> Tensor:
        on_gpu = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
            logits = self.model(input_ids=self.ids, use_cache=False).logits
            loss = self.loss(logits, self.ids, self.weights, self.weights[:, 1:].sum())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def train(
    group: Group, size: str, length: int, keep: int, sharing: list[str], rounds: int
) -> list[dict[str, Any]]:
    cells = []
    one = Training(group, size, length, keep, None) if group.rank == 0 else None
    wanted = group.from_first(float(one.step()) if one else 0.0)
    alone = group.times(one.step if one else lambda: None, rounds, alone=True)
    parameters = int(group.from_first(one.parameters if one else 0))
    one = None
    group.free()
    for how in sharing:
        shared = Training(group, size, length, keep, how)
        loss = group.from_first(float(shared.step()))
        if abs(loss - wanted) > 1e-2:
            raise SystemExit(f"{size} {how}: the first loss is {loss}, alone {wanted}")
        together = group.times(shared.step, rounds, alone=False)
        cells.append(
            {
                "part": "train",
                "size": size,
                "parameters": parameters,
                "length": length,
                "keep": keep,
                "sharing": how,
                "losses": [wanted, loss],
                "tokens_per_second": group.size * length / together.median,
                **efficiency(alone, together, 1),
            }
        )
        del shared
        group.free()
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=["prefill", "train"])
    parser.add_argument("--length", type=int, help="of the prompt; default 262144")
    parser.add_argument("--chunk", type=int, help="tokens that a process reads at once; 32768")
    parser.add_argument("--sizes", nargs="+", help="to train: 80M, 200M, 680M, 1.7B; default 80M")
    parser.add_argument("--sharing", nargs="+", choices=["ddp", "fsdp"], default=["ddp", "fsdp"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    group = Group(args.device)
    document: dict[str, Any] = {
        "benchmark": "parallel",
        "complete": False,
        **environment(args.device),
        "processes": group.size,
        "backend": dist.get_backend(),
        "rounds": args.rounds,
        "cells": [],
    }

    def note(cells: list[dict[str, Any]]) -> None:
        document["cells"] += cells
        if group.rank == 0:
            for cell in cells:
                print(line(cell), flush=True)
            if args.out:
                args.out.write_text(json.dumps(document, indent=1) + "\n")

    parts = args.parts or ["prefill", "train"]
    if "prefill" in parts:
        length = args.length or (262_144 if on_gpu else 1_000)
        chunk = args.chunk or (32_768 if on_gpu else 128)
        note([prefill(group, length, chunk, 2_048 if on_gpu else 64, args.rounds)])
        group.free()
    if "train" in parts:
        for size in args.sizes or (["80M"] if on_gpu else ["tiny"]):
            length, keep = (32_768, 1_024) if on_gpu else (256, 64)
            note(train(group, size, length, keep, args.sharing, args.rounds))
    document["complete"] = True
    note([])
    dist.destroy_process_group()


def line(cell: dict[str, Any]) -> str:
    name = f"{cell['part']} {cell.get('size', '')} {cell.get('sharing', '')} {cell['length']}"
    alone, together = (cell[side]["median"] for side in ("alone", "together"))
    low, middle, high = (cell["efficiency"][key] for key in ("low", "median", "high"))
    text = f"{name}: {alone:.4f} s alone, {together:.4f} s together"
    return f"{text}, efficiency {middle:.1%} ({low:.1%} to {high:.1%})"


if __name__ == "__main__":
    main()
