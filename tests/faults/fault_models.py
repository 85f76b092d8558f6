"""A tiny Llama and its plan."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynmask.hf import calibrate

VOCAB, LENGTH = 97, 16
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Sharp maps: at the usual 0.02 they would be flat, and every mask right.
    "initializer_range": 0.3,
}


def make_model(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


def random_ids(length: int, *, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (1, length), generator=draw)


def texts() -> list[list[int]]:
    return [random_ids(64, seed=seed)[0].tolist() for seed in range(4)]


SETTINGS = {"capture_length": LENGTH, "coverage_length": 4 * LENGTH, "mu": 0.3}


def plan_for(model, **options):
    return calibrate(model, None, texts(), **SETTINGS, **options)


def tokens(model, *, length: int = 90, seed: int = 0, new: int = 8, **options) -> torch.Tensor:
    """Greedy tokens after a random prompt."""
    ids = random_ids(length, seed=seed)
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            **options,
        )


def state(model):
    """What acceleration touches: configurations, their attention, attributes and hooks."""
    return [
        (
            id(vars(module).get("config")),
            getattr(vars(module).get("config"), "_attn_implementation", None),
            sorted(vars(module)),
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            module.training,
        )
        for module in model.modules()
    ]
