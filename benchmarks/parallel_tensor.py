"""The part `tensor` of `parallel.py`: heads of one prompt split over the GPUs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from dma_prefill import SHAPE, build
from dma_prefill import TINY as TINY_SHAPE
from parallel_group import Group, efficiency
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import dynmask
from dynmask.dam import Dynamic
from dynmask.dma import DmaConfig, DmaForCausalLM

MODELS = ["dense", "dynamic", "dma"]
# In bfloat16 16 layers of width 256 differ on a CPU by 1.1 % (dense) and by 1.8 % (DMA, where other
# scores come last of the kept ones). A single wrong head is what float64 on the CPU finds.
BOUND = {"cuda": 5e-2, "cpu": 1e-9}
# Of the far blocks, beside those that are near: what a trained model keeps at 32K, about.
KEPT = 0.025
TINY = Dynamic(coverage=0.8, tile=16, block=16, near=8, landmarks=8, shortest=64)
NEW = {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False}


def tensor(group: Group, name: str, length: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Measure one of `MODELS`."""
    on_gpu = group.device.type == "cuda"
    # On the CPU so large that attention is not flat and there is something to choose.
    shape = SHAPE if on_gpu else TINY_SHAPE | {"initializer_range": 0.3}
    keep = 2_048 if on_gpu else 64
    with folder(group) as place:
        if name == "dma":
            dma = DmaConfig(**shape, qk_norm=False, keep=keep)
            pair = load(group, DmaForCausalLM, dma, place)
        else:
            pair = load(group, LlamaForCausalLM, LlamaConfig(**shape), place)
    more = {"dense": {}, "dynamic": {"kept": KEPT if on_gpu else None}, "dma": {"keep": keep}}
    yield cell(group, name, pair, length, rounds) | more[name]


@contextmanager
def folder(group: Group) -> Iterator[Path]:
    """A folder that all processes know and the first one removes."""
    place = Path(group.from_first(tempfile.mkdtemp() if group.rank == 0 else ""))
    try:
        yield place
    finally:
        if group.rank == 0:
            shutil.rmtree(place, ignore_errors=True)


def load(group: Group, kind: Any, config: Any, place: Path) -> tuple[Any, Any]:
    """Save random weights once; return the whole model (None but in the first) and the split."""
    group.run(lambda: build(kind, config, group.device.type).save_pretrained(place), alone=True)
    # In float64 on the CPU, so that rounding cannot hide a wrong head.
    how = {"dtype": torch.bfloat16 if group.device.type == "cuda" else torch.float64}
    whole = group.run(
        lambda: kind.from_pretrained(place, **how).to(group.device).eval(), alone=True
    )
    config = DistributedConfig(tp_plan="auto")
    split: Any = group.run(
        lambda: kind.from_pretrained(place, distributed_config=config, **how).eval()
    )
    weight = split.model.layers[0].self_attn.q_proj.weight
    if weight.to_local().numel() * group.size != weight.numel():
        raise ValueError("the heads are not split")
    return whole, split


def cell(
    group: Group, name: str, pair: tuple[Any, Any], length: int, rounds: int
) -> dict[str, Any]:
    """Compare what both give, and time both."""
    torch.manual_seed(length)
    vocabulary = pair[1].config.vocab_size
    tokens = torch.randint(vocabulary, (1, length), device=group.device)
    one = Side(group, name, pair[0], tokens, rounds, alone=True)
    both = Side(group, name, pair[1], tokens, rounds, alone=False)
    error, same = 0.0, True
    if group.rank == 0:
        error = float((both.logits - one.logits).norm() / one.logits.norm())
        same = one.words is None or torch.equal(one.words, both.words)
    error, same = group.from_first((error, same))
    if not error < BOUND[group.device.type]:
        raise ValueError(f"{name}: the logits of split and alone differ by {error}")
    if not same:
        raise ValueError(f"{name}: split and alone go on with other tokens")
    return {
        "part": "tensor",
        "model": name,
        "length": length,
        "error": error,
        **group.from_first(one.more),
        **efficiency(one.times, both.times, group.size),
    }


class Side:
    """The last logits, the next tokens (on a CPU) and the times of the whole or the split model."""

    def __init__(
        self, group: Group, name: str, model: Any, tokens: Tensor, rounds: int, *, alone: bool
    ):
        on_gpu = group.device.type == "cuda"

        @torch.no_grad()
        def forward() -> Tensor:
            return model(tokens, use_cache=False, logits_to_keep=1).logits.double()

        self.more: dict[str, Any] = {}
        self.words = None
        with ExitStack() as stack:
            run: Any = None
            if name == "dynamic":
                if on_gpu:
                    stack.enter_context(random_blocks(group.device))
                how = {} if on_gpu else {"dynamic": TINY}
                run = group.run(lambda: dynmask.accelerate(model, **how), alone=alone)
            if run is not None:
                stack.enter_context(run)
            self.logits: Any = group.run(forward, alone=alone)
            if not on_gpu:
                self.words = group.run(lambda: model.generate(tokens, **NEW), alone=alone)
            self.times = group.times(forward, rounds, alone=alone)
            if run is not None:
                self.more = {"density": run.stats()["density"]["prefill"]}


@contextmanager
def random_blocks(device: torch.device) -> Iterator[None]:
    """Have the selection run, and keep the same random blocks in all heads and layers.

    Random weights have flat attention maps, which ask for no block at all. The blocks do not depend
    on rounding, so split and alone must agree as closely as dense ones.
    """
    from dynmask.dam.triton import keep as module

    real = module.keep

    def keep(cost: Tensor, far: Tensor, allowed: float) -> Tensor:
        kept = real(cost, far, allowed)
        draw = torch.Generator(device).manual_seed(0)
        chosen = torch.rand(kept.shape[2:], device=device, generator=draw) < KEPT
        chosen &= torch.arange(kept.shape[3], device=device) < far[:, None]
        return chosen.expand(kept.shape).contiguous()

    with patch.object(module, "keep", keep):
        yield
