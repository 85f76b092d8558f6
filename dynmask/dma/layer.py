"""Dynamic Mask Attention as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Cache
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from dynmask.dma.cache import LifetimeCache
from dynmask.dma.configuration import DmaConfig
from dynmask.dma.score import ValueScore
from dynmask.dma.selection import check_keep, keep_of, select
from dynmask.dma.slots import Slots, read_slots
from dynmask.masks import Lifetimes
from dynmask.ops import attention


class DynamicMaskAttention(nn.Module):
    r"""Causal self-attention to the keys of highest score, a score that reads the values alone.

    For kv head ``g`` and its ``H / G`` query heads::

        q, k, v = Wq x, Wk x, Wv x       RMSNorm of q and k by head, then RoPE on both
        delta   = exp(A softplus(Wdt v))                      [B, G, N], in float32
        S_i     = the w keys j <= i of largest delta_j        (the earlier one of equals)
                  of them first those of i - n < j <= i, and the best w - n of the older
        o_i     = softmax over S_i of (q_i k_j / sqrt(d) + delta_j), times v_j
        y       = Wo concat(o)

    with ``w = keep`` and ``n = window``, 0 in the paper; above 148 the tangent of exp takes its
    place (`dynmask.dma.score`). The choice of ``S_i`` has no gradient;
    ``delta`` learns through its place in the logits, from the rows that saw the key. The score of a
    token does not depend on any other, so later tokens never change what a row sees, unless
    ``keep`` is a share of the length.

    Args:
        config: Shape and options; `hidden_size`, the heads, `keep`, `window`, `threshold`, `score`,
            `a_std`, `qk_norm`, `attention_bias`, `rope_parameters` and `impl` count here.
        layer_idx: Number of the layer: its place in a cache and in a list given as ``keep``.

    Source: DMA, arXiv 2508.02124.
    """

    def __init__(self, config: DmaConfig, layer_idx: int = 0):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        width, bias, std = config.hidden_size, config.attention_bias, config.initializer_range
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        dim = config.head_dim
        assert groups is not None  # The configuration fills both in.
        assert dim is not None
        self.head_dim = dim
        self.q_proj = nn.Linear(width, heads * dim, bias=bias)
        self.k_proj = nn.Linear(width, groups * dim, bias=bias)
        self.v_proj = nn.Linear(width, groups * dim, bias=bias)
        self.o_proj = nn.Linear(heads * dim, width, bias=bias)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=std)
            if bias:
                nn.init.zeros_(linear.bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(dim, eps=config.rms_norm_eps)
        self.score = ValueScore(groups, dim, form=config.score, std=std, a_std=config.a_std)
        # For use without a model around it.
        self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        documents: Tensor | None = None,
        past_key_values: Cache | None = None,
        slots: Slots | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            hidden_states: ``[B, N, hidden_size]``.
            attention_mask: ``[B, N]``, 1 for real tokens, 0 for padding, wherever it is; with a
                cache ``[B, cached + N]``. None if all tokens are real. A row of padding before the
                first real token or behind the last gives 0 (Wo's bias, if there is one). With
                documents the real tokens of a row must be one run.
            position_ids: ``[B or 1, N]``, for RoPE. None counts each row's real tokens from 0, anew
                in each document. Ids that do not go on from one real token to the next start a new
                document. With a cache that is an error on the CPU; on other devices nobody looks,
                since that would wait for the device, and tokens see all that came before.
            documents: ``[B or 1, N]`` integers that never fall along a row, the document of each
                token: tokens attend within theirs. None leaves it to the position ids.
            past_key_values: A `LifetimeCache`, to which the tokens are added.
            slots: What the model around has read from the four arguments above, in place of them.
            position_embeddings: RoPE's ``cos`` and ``sin``, ``[B or 1, N, d]``, if they are there.

        Returns:
            ``[B, N, hidden_size]``.

        Raises:
            ValueError: If there are no tokens, shapes do not fit, the cache is another, documents
                come with a cache, or the configuration's ``keep`` or ``window`` was set to what is
                no rule.
        """
        cache = lifetime_cache(past_key_values)
        if slots is None:
            # Assigned since the configuration was made? A model around has asked for all layers.
            check_keep(self.config.keep, self.config.num_hidden_layers, self.config.window)
            slots = read_slots(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                documents=documents,
                past=None if cache is None else cache.get_seq_length(self.layer_idx),
            )
        if position_embeddings is None:
            position_embeddings = self.rotary_emb(hidden_states, slots.position_ids)
        by_head = (*hidden_states.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(hidden_states).view(by_head)).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden_states).view(by_head)).transpose(1, 2)
        v = self.v_proj(hidden_states).view(by_head).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        q, k = q.to(v.dtype), k.to(v.dtype)  # Under autocast norms and RoPE give float32.
        score = self.score(v)
        k, v, score, mask = self._select(k, v, score, slots, cache)
        out = attention(q, k, v, mask, bias=score, impl=self.config.impl)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _select(
        self, k: Tensor, v: Tensor, score: Tensor, slots: Slots, cache: LifetimeCache | None
    ) -> tuple[Tensor, Tensor, Tensor, Lifetimes]:
        """Return the keys to attend to, their values, scores, and which row sees which."""
        config = self.config
        keep = keep_of(config.keep, self.layer_idx, k.shape[2])
        if cache is None:
            mask = select(
                score, keep=keep, window=config.window, threshold=config.threshold, slots=slots
            )
            return k, v, score, mask
        if isinstance(config.keep, float) and cache.get_seq_length(self.layer_idx) > 0:
            held: Any = cache.layers[self.layer_idx]
            keep = held.keep  # The share of the first call's length.
        return cache.extend(
            k,
            v,
            score,
            self.layer_idx,
            keep=keep,
            threshold=config.threshold,
            window=config.window if keep is None else min(config.window, keep),
            present=slots.real,
        )


def lifetime_cache(cache: Cache | None) -> LifetimeCache | None:
    """Return the cache, refusing one of another kind.

    Raises:
        ValueError: If it is no `LifetimeCache`.
    """
    if cache is None or isinstance(cache, LifetimeCache):
        return cache
    raise ValueError(
        f"{type(cache).__name__} has no place for the scores of the keys: pass "
        "past_key_values=dynmask.dma.LifetimeCache(), or none"
    )
