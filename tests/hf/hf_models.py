"""Tiny random models and plans."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from dynmask.dam import LayerPlan, MaskPlan, Settings, describe_data
from dynmask.hf import fingerprint
from dynmask.hf.compat import attention_layers

VOCAB = 97
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Sharp maps: at the usual 0.02 they would be flat, and every mask right.
    "initializer_range": 0.3,
}
_GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
# Values of another width than keys, which are made of what the cache holds.
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 3,
}
_KINDS = {
    "llama": ("Llama", "LlamaConfig", {}),
    "llama-mha": ("Llama", "LlamaConfig", {"num_key_value_heads": 4}),
    "qwen3": ("Qwen3", "Qwen3Config", {"head_dim": 16}),
    "mistral": ("Mistral", "MistralConfig", {"sliding_window": None}),
    "mistral-window": ("Mistral", "MistralConfig", {"sliding_window": 8}),
    "gemma3": ("Gemma3", "Gemma3TextConfig", _GEMMA),
    "phi3": ("Phi3", "Phi3Config", {}),
    "deepseek": ("DeepseekV3", "DeepseekV3Config", _LATENT),
    "diffllama": ("DiffLlama", "DiffLlamaConfig", {}),
    "gemma2-softcap": ("Gemma2", "Gemma2Config", {**_GEMMA, "attn_logit_softcapping": 2.0}),
}
PLANNED = ["llama", "llama-mha", "qwen3", "mistral", "gemma3", "phi3", "deepseek"]


def make_model(kind: str, *, seed: int = 0, config=None, **changes) -> nn.Module:
    family, config_class, extra = _KINDS[kind]
    torch.manual_seed(seed)
    config = config or getattr(transformers, config_class)(**{**_SIZES, **extra, **changes})
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def make_plan(model: nn.Module, *, length: int = 12, seed: int = 0) -> MaskPlan:
    """A plan of random stripes; heads 1 and 3 of every layer are gated dense."""
    draw = torch.Generator().manual_seed(seed)

    def some(first: int) -> torch.Tensor:
        rest = torch.randperm(length - 1, generator=draw)[:3] + 1
        return torch.cat([torch.full((1,), first), rest[rest != first]]).unique()

    layers = {}
    for layer in attention_layers(model):
        if layer.own_window is not None:
            continue
        heads = layer.heads
        corner = (torch.rand(heads, length, length, generator=draw) < 0.3).tril()
        corner |= torch.eye(length, dtype=torch.bool)
        share = torch.rand(heads, generator=draw)
        layers[layer.index] = LayerPlan(
            columns=tuple(some(int(h % 2)) for h in range(heads)),
            offsets=tuple(some(0) for _ in range(heads)),
            corner=corner,
            coverage=share,
            tail_coverage=share,
            corner_coverage=share,
            gate=torch.arange(heads) % 2 == 1,
            previews=torch.zeros(2, heads, length, length, dtype=torch.float16),
        )
    return MaskPlan(
        fingerprint=fingerprint(model),
        settings=Settings(capture_length=length),
        data=describe_data([[1, 2], [3]], holdout=1),
        layers=layers,
    )


def planned_mask(plan, layer: int, mode: str, lengths_and_starts, size: int) -> torch.Tensor:
    """[B, H, N, N] bool by the definition of a plan, pair by pair."""
    part = plan.layers[layer]
    heads = len(part.columns)
    seen = torch.zeros(len(lengths_and_starts), heads, size, size, dtype=torch.bool)
    for b, (length, start) in enumerate(lengths_and_starts):
        for h in range(heads):
            corner = part.corner[h].tolist()
            columns, offsets = set(part.columns[h].tolist()), set(part.offsets[h].tolist())
            dense = mode == "dense" or (mode == "auto" and bool(part.gate[h]))
            for i in range(length):
                for j in range(i + 1):
                    in_corner = i < len(corner) and corner[i][j]
                    if dense or j in columns or i - j in offsets or in_corner:
                        seen[b, h, start + i, start + j] = True
    return seen


def snapshot(model: nn.Module):
    """Everything that streaming and accelerating touch."""
    return [
        (
            module.training,
            id(vars(module).get("config")),
            getattr(vars(module).get("config"), "_attn_implementation", None),
            sorted(vars(module)),
            len(module._forward_hooks) + len(module._forward_pre_hooks),
        )
        for module in model.modules()
    ]


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(side: str, lengths: tuple[int, ...], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of rows of these lengths, padded on a side to a size."""
    ids = random_ids(len(lengths), size)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, size - length if side == "left" else 0 : None if side == "left" else length] = 1
    return ids * mask, mask
