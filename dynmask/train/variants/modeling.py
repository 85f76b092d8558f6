"""Llama decoders whose self-attention is native sparse attention or mixture of block attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from dynmask.baselines.moba import MixtureOfBlockAttention
from dynmask.baselines.nsa import NativeSparseAttention
from dynmask.baselines.nsa_compress import BlockCompression
from dynmask.baselines.trainable import Angles, Runs, TrainableAttention
from dynmask.dma.slots import embedded, read_slots
from dynmask.train.variants.configuration import MobaConfig, NsaConfig
from dynmask.train.variants.runs import read_runs

_HARMLESS = frozenset(
    {"cache_position", "is_causal", "num_items_in_batch", "output_hidden_states", "token_type_ids"}
)


def _attention(config: NsaConfig | MobaConfig, layer_idx: int) -> TrainableAttention:
    shape: dict[str, Any] = {
        "heads": config.num_attention_heads,
        "groups": config.num_key_value_heads,
        "dim": config.head_dim,
        "bias": config.attention_bias,
        "impl": config.impl,
        "layer_idx": layer_idx,
    }
    if isinstance(config, NsaConfig):
        return NativeSparseAttention(
            config.hidden_size,
            **shape,
            blocks=config.blocks,
            compress_hidden=config.compress_hidden,
        )
    return MixtureOfBlockAttention(config.hidden_size, **shape, block=config.block, top=config.top)


class VariantDecoderLayer(LlamaDecoderLayer):
    """Attention and MLP, each behind a norm and added to the residual stream.

    Args:
        config: Shape, and which attention.
        layer_idx: Number of the layer, from 0.
    """

    def __init__(self, config: NsaConfig | MobaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = _attention(config, layer_idx)  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: Angles,
        runs: Runs | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Return the residual stream ``[B, N, hidden_size]`` behind this layer.

        Args:
            hidden_states: ``[B, N, hidden_size]``.
            position_embeddings: RoPE's ``cos`` and ``sin`` of all positions.
            runs: Where the sequences stand; see `TrainableAttention.forward`.
            past_key_values: The cache, if there is one.
        """
        hidden_states = hidden_states + self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            runs=runs,
            past_key_values=past_key_values,
        )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class _Variant(LlamaPreTrainedModel):
    """What these models share: how weights start, what transformers may do with them."""

    _no_split_modules = ["VariantDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": VariantDecoderLayer}  # noqa: RUF012
    # Their attention is their own.
    _supports_flash_attn = False
    _supports_sdpa = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BlockCompression):
            init.zeros_(module.memory)
            init.zeros_(module.places)


class _VariantModel(_Variant, LlamaModel):
    """The decoder without a head: tokens in, hidden states out.

    Args:
        config: Shape, and which attention.
    """

    def __init__(self, config: NsaConfig | MobaConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            VariantDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: ``[B, N]`` tokens, or give ``inputs_embeds``.
            attention_mask: ``[B, N]``, 1 for real tokens, which are one run a row, 0 for padding;
                with a cache ``[B, cached + N]``. None if all tokens are real.
            position_ids: ``[B or 1, N]``. Ids that do not go on from one token to the next start a
                new document, and tokens attend within theirs; for RoPE each document counts its
                own from 0, whatever the ids. Documents and a cache do not go together.
            past_key_values: A ``DynamicCache``, to which the tokens are added.
            inputs_embeds: ``[B, N, hidden_size]`` in place of tokens.
            use_cache: Whether to make a cache if none is given. Packed documents get none.
            kwargs: ``output_hidden_states`` and ``return_dict``, as for all models of transformers.

        Returns:
            ``last_hidden_state`` ``[B, N, hidden_size]``, ``past_key_values``, ``hidden_states``.

        Raises:
            ValueError: If there are no tokens, shapes do not fit, the cache is another, documents
                come with a cache, or an argument is not known.
        """
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        if unknown := sorted(given - _HARMLESS):
            raise ValueError(
                f"{type(self).__name__} knows no argument {', '.join(unknown)}: leave it out"
            )
        inputs_embeds = embedded(self.embed_tokens, input_ids, inputs_embeds)
        cache = _dynamic(past_key_values)
        past = None if cache is None else cache.get_seq_length()
        slots = read_slots(
            inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, past=past
        )
        documents = None if slots.documents is None else slots.documents.ids
        batch, length = inputs_embeds.shape[0], inputs_embeds.shape[1] + (past or 0)
        runs = read_runs(documents, attention_mask, batch=batch, length=length)
        if use_cache and cache is None and documents is None:
            cache = DynamicCache(config=self.config)
        every = torch.arange(length, device=inputs_embeds.device)[None]
        position_embeddings = self.rotary_emb(inputs_embeds, every)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                runs=runs,
                past_key_values=cache,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=cache
        )


def _dynamic(cache: Cache | None) -> DynamicCache | None:
    """Return the cache, refusing one that does not hold just the tokens so far."""
    if cache is None or isinstance(cache, DynamicCache):
        return cache
    raise ValueError(
        f"{type(cache).__name__} is not read: pass a transformers.DynamicCache, or none (in "
        "generate, leave cache_implementation out)"
    )


class _VariantForCausalLM(_Variant, LlamaForCausalLM):
    _model: type[_VariantModel]

    def __init__(self, config: NsaConfig | MobaConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = self._model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class NsaModel(_VariantModel):
    """A Llama decoder with native sparse attention, without a head.

    Args:
        config: Shape and lengths.
    """

    config_class = NsaConfig


class NsaForCausalLM(_VariantForCausalLM):
    """A Llama decoder with native sparse attention and a language modeling head.

    Its cache holds all keys and values; compressed blocks are computed from it at every step.

    Args:
        config: Shape and lengths.
    """

    config_class = NsaConfig
    _model = NsaModel


class MobaModel(_VariantModel):
    """A Llama decoder with mixture of block attention, without a head.

    Args:
        config: Shape and lengths.
    """

    config_class = MobaConfig


class MobaForCausalLM(_VariantForCausalLM):
    """A Llama decoder with mixture of block attention and a language modeling head.

    Its cache holds all keys and values.

    Args:
        config: Shape and lengths.
    """

    config_class = MobaConfig
    _model = MobaModel
