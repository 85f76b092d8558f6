"""Floating-point operations of a training step, for MFU."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from dynmask.bench.environment import ceilings
from dynmask.bench.timing import Clock
from dynmask.dma.selection import keep_of


def flops_per_token(model: PreTrainedModel, length: int) -> float | None:
    r"""Operations of forward and backward pass for one token, ``6 P + 12 \sum_l H d K_l``.

    ``P`` are the parameters that multiply (all but an embedding that is not the output projection
    too), ``K_l`` the mean number of keys that a row of layer ``l`` sees in one document of
    ``length`` tokens: ``(length + 1) / 2`` in a dense layer, fewer where DMA keeps ``w``.
    Recomputed activations, norms, softmax and DMA's selection do not count.

    Args:
        model: a decoder of transformers.
        length: tokens of a sequence.

    Returns:
        None where it is not known: the keys follow the content (DMA with a threshold), or the type
        of model attends in another way.
    """
    config: Any = model.config
    if config.model_type not in ("llama", "dma"):
        return None
    if getattr(config, "threshold", None) is not None:
        return None
    parameters = sum(p.numel() for p in model.parameters())
    if not config.tie_word_embeddings:
        embedding: Any = model.get_input_embeddings()
        parameters -= embedding.weight.numel()
    dim = config.head_dim or config.hidden_size // config.num_attention_heads
    keep = getattr(config, "keep", None)
    layers = config.num_hidden_layers
    kept = keep if isinstance(keep, list) else [keep] * layers
    keys = sum(map(partial(_mean_keys, length), kept))
    return 6 * parameters + 12 * config.num_attention_heads * dim * keys


def _mean_keys(length: int, keep: float | None) -> float:
    """Mean over rows ``i`` of ``min(i + 1, keep)``."""
    kept = keep_of(keep, 0, length)
    keep = length if kept is None else min(kept, length)
    return (keep * (keep + 1) / 2 + (length - keep) * keep) / length


def measured_peak(device: torch.device) -> float:
    """Operations per second of a large matrix product: bf16 on a GPU, fp32 on a CPU."""
    with torch.no_grad():
        peak = ceilings(Clock(device))["matmul"]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return peak
