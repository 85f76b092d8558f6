"""How prefill and training scale over the GPUs of one machine.

    torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py [--parts prefill tensor train]
        [--length 262144] [--chunk 32768] [--split-length 32768] [--models dense dynamic dma]
        [--sizes 80M 680M 1.7B] [--sharing ddp fsdp] [--rounds 10] [--out FILE]

Each part is timed on one GPU, while the others wait, then on all, in one run; times are wall clock
of the slowest process between two synchronized points, medians with quartiles. FILE is written
after every cell. A part that fails is named under `failed`, the others go on, and the exit code is
1.

prefill: Llama-3.2-1B's shape with random weights in bfloat16, `keep` 2,048, one prompt of --length
tokens. Alone it is read into a `LifetimeCache` in chunks; together by `context_prefill`, each
process a chunk at a time. Efficiency is one GPU's time over P times theirs. Before, the last
logits of both must agree.

tensor: one prompt of --split-length tokens through Llama-3.2-1B's shape with random weights in
bfloat16, loaded whole by the first process and split by transformers' `tp_plan` by all; time to the
last token's logits, without a cache. `dense` is transformers' Llama with torch's kernels, `dynamic`
the same under `accelerate` (the selection runs; since random weights have flat attention maps,
random blocks are kept, the same in all heads), `dma` a DMA model with `keep` 2,048. Before, the
last logits of both must agree.

train: `dynmask train`'s step (as in train_speed.py: bf16 autocast over fp32 weights, compiled
layers and loss, fused AdamW, recomputation from 1B parameters on), 32,768 tokens in one sequence
for each process, replicated (DDP) and sharded by accelerate as `dynmask train` has it (FSDP2:
gathered in bfloat16, gradients summed in float32). The work of a process stays the same, so
efficiency is one GPU's time over theirs. Before, the losses of the first process must agree.

`--device cpu` shows with gloo on tiny models that this runs, no more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from dma_prefill import SHAPE, build, read
from dma_prefill import TINY as TINY_SHAPE
from parallel_group import Group, efficiency
from parallel_tensor import MODELS, tensor
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from train_speed import RECOMPUTE_FROM, configuration

from dynmask.bench.environment import environment
from dynmask.dma import DmaConfig, DmaForCausalLM, LifetimeCache
from dynmask.dma.parallel import context_prefill
from dynmask.train.arguments import training_arguments
from dynmask.train.recipe import Recipe
from dynmask.train.trainer import weighted_loss

# Of a first loss near 10.4, the vocabulary's logarithm. Weights gathered in bfloat16 move the loss
# of 80M on 1,024 tokens by 8e-4.
LOSS_BOUND = 1e-2
PARTS = ["prefill", "tensor", "train"]
SHARING = ["ddp", "fsdp"]


def prefill(
    group: Group, length: int, chunk: int, keep: int, rounds: int
) -> Iterator[dict[str, Any]]:
    on_gpu = group.device.type == "cuda"
    shape = SHAPE if on_gpu else TINY_SHAPE
    # All processes draw the same weights and tokens.
    config = DmaConfig(**shape, qk_norm=False, keep=keep)
    model = group.run(lambda: build(DmaForCausalLM, config, group.device.type))
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

    wanted, found = (group.run(call).float() for call in (alone, together))
    error = float((wanted - found).norm() / wanted.norm())
    if not error < 2e-2:
        raise ValueError(f"prefill together differs from prefill alone: {error}")
    width = shape["head_dim"]
    number = torch.finfo(model.dtype).bits // 8
    a_key = shape["num_key_value_heads"] * (2 * width * number + 4)
    pieces = -(-length // (group.size * chunk))
    one = group.times(alone, rounds, alone=True)
    all_of_them = group.times(together, rounds, alone=False)
    yield {
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
        if sharing == "ddp":
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        elif sharing is not None:
            model = shard(model, self.device)
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


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Shard a model by accelerate, with the arguments of `dynmask train`."""
    # Not public, so that only what needs it fails without it.
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    arguments = training_arguments(Recipe.load("80M"), Path("unused"), workers=0, fsdp=True)
    plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    # What it reads of an Accelerator, which refuses a CPU.
    settings = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=None,
        mixed_precision="bf16" if arguments.bf16 else "no",
        is_main_process=dist.get_rank() == 0,
        device=device,
    )
    return fsdp2_prepare_model(settings, model)


def train(
    group: Group, size: str, length: int, keep: int, sharing: list[str], rounds: int
) -> Iterator[dict[str, Any]]:
    one = group.run(lambda: Training(group, size, length, keep, None), alone=True)
    first = group.run(lambda: float(one.step()), alone=True)  # type: ignore[union-attr]
    alone = group.times(lambda: one.step(), rounds, alone=True)  # type: ignore[union-attr]
    wanted, parameters = group.from_first((first, one.parameters if one else 0))
    one = None
    group.free()
    for how in sharing:
        shared: Any = group.run(lambda how=how: Training(group, size, length, keep, how))
        loss = group.from_first(group.run(lambda shared=shared: float(shared.step())))
        if not abs(loss - wanted) <= LOSS_BOUND:
            raise ValueError(f"the first loss is {loss} by {how}, alone {wanted}")
        together = group.times(shared.step, rounds, alone=False)
        yield {
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
        shared = None
        group.free()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--length", type=int, help="of prefill's prompt; default 262144")
    parser.add_argument("--chunk", type=int, help="tokens that a process reads at once; 32768")
    parser.add_argument("--split-length", type=int, help="of tensor's prompt; default 32768")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="of tensor")
    parser.add_argument("--sizes", nargs="+", help="to train: 80M, 200M, 680M, 1.7B; default 80M")
    parser.add_argument("--sharing", nargs="+", choices=SHARING, default=SHARING)
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
        "failed": [],
        "cells": [],
    }

    def write() -> None:
        if group.rank == 0 and args.out:
            args.out.write_text(json.dumps(document, indent=1) + "\n")

    def note(name: str, cells: Iterable[dict[str, Any]]) -> None:
        try:
            for cell in cells:
                document["cells"].append(cell)
                if group.rank == 0:
                    print(line(cell), flush=True)
                write()
        except Exception as error:  # of memory, a kernel, a library: the other parts still count
            document["failed"].append({"part": name, "error": f"{type(error).__name__}: {error}"})
            if group.rank == 0:
                print(f"{name} failed: {error}", flush=True)
            write()
        group.free()

    if "prefill" in args.parts:
        length = args.length or (262_144 if on_gpu else 1_000)
        chunk = args.chunk or (32_768 if on_gpu else 128)
        note("prefill", prefill(group, length, chunk, 2_048 if on_gpu else 64, args.rounds))
    if "tensor" in args.parts:
        length = args.split_length or (32_768 if on_gpu else 300)
        for name in args.models:
            note(f"tensor {name}", tensor(group, name, length, args.rounds))
    if "train" in args.parts:
        for size in args.sizes or (["80M"] if on_gpu else ["tiny"]):
            length, keep = (32_768, 1_024) if on_gpu else (256, 64)
            note(f"train {size}", train(group, size, length, keep, args.sharing, args.rounds))
    document["complete"] = not document["failed"]
    write()
    dist.destroy_process_group()
    if document["failed"]:
        raise SystemExit(1)


def line(cell: dict[str, Any]) -> str:
    keys = ("part", "model", "size", "sharing", "length")
    name = " ".join(str(cell[key]) for key in keys if key in cell)
    alone, together = (cell[side]["median"] for side in ("alone", "together"))
    low, middle, high = (cell["efficiency"][key] for key in ("low", "median", "high"))
    text = f"{name}: {alone:.4f} s alone, {together:.4f} s together"
    return f"{text}, efficiency {middle:.1%} ({low:.1%} to {high:.1%})"


if __name__ == "__main__":
    main()
