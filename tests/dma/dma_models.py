"""Tiny DMA layers and models, and a slow layer that goes by the paper, row by row."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from dynmask.dma import DmaConfig, DmaForCausalLM, DynamicMaskAttention

VOCAB = 97
SIZES = {
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
    # At the usual 0.02 scores and attention would be almost flat, and every selection right.
    "initializer_range": 0.3,
}


def config(**changes) -> DmaConfig:
    return DmaConfig(**{**SIZES, "keep": 7, **changes})


def make_layer(*, seed: int = 0, dtype=torch.float32, **changes) -> DynamicMaskAttention:
    torch.manual_seed(seed)
    layer = DynamicMaskAttention(config(**changes)).to(dtype).eval()
    torch.nn.init.normal_(layer.score.A, std=0.5)
    return layer


def make_model(*, seed: int = 0, **changes) -> DmaForCausalLM:
    torch.manual_seed(seed)
    model = DmaForCausalLM(config(**changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("score.A"):
                weight.normal_()
    return model


def random_ids(batch: int, length: int, *, seed: int = 0) -> Tensor:
    """Tokens; none twice in a row where there are enough: equal tokens tie in the first layer."""
    draw = torch.Generator().manual_seed(seed)
    if length > VOCAB - 3:
        return torch.randint(3, VOCAB, (batch, length), generator=draw)
    return (
        torch.stack([torch.randperm(VOCAB - 3, generator=draw)[:length] for _ in range(batch)]) + 3
    )


def hidden(batch: int, length: int, *, seed: int = 0, dtype=torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, SIZES["hidden_size"], generator=draw).to(dtype)


def paper_score(layer: DynamicMaskAttention, v: Tensor) -> Tensor:
    """``[G, N]`` for ``v [G, N, d]``, one by one."""
    groups, length, _ = v.shape
    weight, factor = layer.score.dt_proj.weight, layer.score.A
    score = torch.zeros(groups, length, dtype=v.dtype)
    for g in range(groups):
        for j in range(length):
            step = torch.log1p(torch.exp(weight[g] @ torch.cat([v[h, j] for h in range(groups)])))
            score[g, j] = factor[g] * step
    return score.exp() if layer.score.form == "exp" else score


def paper_layer(
    layer: DynamicMaskAttention,
    x: Tensor,
    *,
    keep: int,
    threshold: float | None = None,
    window: int = 0,
) -> Tensor:
    """Equations of the paper for one text ``[N, width]``, each row's keys chosen by sorting.

    The paper has no window: there the nearest keys are seen first, and then the best of the older.
    """
    shape = layer.config
    heads, groups, d = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    length = x.shape[0]
    q, k, v = (
        p(x).view(length, -1, d).transpose(0, 1) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    q, k = layer.q_norm(q), layer.k_norm(k)
    cos, sin = LlamaRotaryEmbedding(shape)(x, torch.arange(length)[None])
    q, k = (t[0] for t in apply_rotary_pos_emb(q[None], k[None], cos, sin))
    score = paper_score(layer, v)
    out = torch.zeros(length, heads, d, dtype=x.dtype)
    for h in range(heads):
        g = h // (heads // groups)
        for i in range(length):
            older = range(max(0, i + 1 - window))
            order = sorted(older, key=lambda j: (-score[g, j].item(), j))
            best = [j for j in order if threshold is None or score[g, j] >= threshold]
            kept = [*range(len(older), i + 1), *best[: keep - window]]
            if kept:
                logits = k[g, kept] @ q[h, i] / d**0.5 + score[g, kept]
                out[i, h] = logits.softmax(0) @ v[g, kept]
    return layer.o_proj(out.flatten(1))
