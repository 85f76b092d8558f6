"""A decoder of the Llama and Qwen3 shape whose attention is Dynamic Mask Attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from dynmask.dma.cache import LifetimeCache
from dynmask.dma.configuration import DmaConfig
from dynmask.dma.layer import DynamicMaskAttention, lifetime_cache
from dynmask.dma.score import ValueScore
from dynmask.dma.selection import check_keep
from dynmask.dma.slots import Slots, embedded, read_slots

# ``generate`` needs its tokenizer for stop strings, and hands it to the model as well.
_HARMLESS = frozenset(
    {
        "cache_position",
        "is_causal",
        "num_items_in_batch",
        "output_hidden_states",
        "token_type_ids",
        "tokenizer",
    }
)
_PACKED = frozenset({"cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q", "seq_idx"})


class DmaDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and added to the residual stream.

    Args:
        config: Shape and options.
        layer_idx: Number of the layer, from 0.
    """

    def __init__(self, config: DmaConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DynamicMaskAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_residual: nn.Parameter | None = None
        self.post_attention_residual: nn.Parameter | None = None
        if config.residual_weights:
            self.input_residual = nn.Parameter(torch.ones(config.hidden_size))
            self.post_attention_residual = nn.Parameter(torch.ones(config.hidden_size))

    def forward(
        self,
        hidden_states: Tensor,
        *,
        slots: Slots,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: LifetimeCache | None = None,
    ) -> Tensor:
        """Return the residual stream ``[B, N, hidden_size]`` behind this layer.

        Args:
            hidden_states: ``[B, N, hidden_size]``.
            slots: What the model has read of its inputs.
            position_embeddings: RoPE's ``cos`` and ``sin``.
            past_key_values: The cache, if there is one.
        """
        attended = self.self_attn(
            self.input_layernorm(hidden_states),
            slots=slots,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
        )
        hidden_states = _weighted(self.input_residual, hidden_states) + attended
        mixed = self.mlp(self.post_attention_layernorm(hidden_states))
        return _weighted(self.post_attention_residual, hidden_states) + mixed


def _weighted(weight: Tensor | None, stream: Tensor) -> Tensor:
    return stream if weight is None else weight * stream


class DmaPreTrainedModel(PreTrainedModel):
    """What DMA models share: how weights start, what transformers may do with them."""

    config_class = DmaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DmaDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": DmaDecoderLayer}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ValueScore):
            std = self.config.initializer_range if self.config.a_std is None else self.config.a_std
            init.normal_(module.A, std=std)
        elif isinstance(module, DmaDecoderLayer):
            for weight in (module.input_residual, module.post_attention_residual):
                if weight is not None:
                    init.ones_(weight)


class DmaModel(DmaPreTrainedModel):
    """The decoder without a head: tokens in, hidden states out.

    Args:
        config: Shape and options.
    """

    def __init__(self, config: DmaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DmaDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]
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
        documents: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: ``[B, N]`` tokens, or give ``inputs_embeds``.
            attention_mask: ``[B, N]``, 1 for real tokens, 0 for padding, wherever it is; with a
                cache ``[B, cached + N]``. None if all tokens are real. With documents the real
                tokens of a row must be one run.
            position_ids: ``[B or 1, N]``. None counts each row's real tokens from 0, anew in each
                document. Ids that do not go on from one real token to the next start a new document
                (`transformers.DataCollatorWithFlattening`). With ``past_key_values`` that is an
                error on the CPU; on other devices nobody looks, since that would wait for the
                device, and tokens see all that came before.
            past_key_values: A `LifetimeCache`, to which the tokens are added.
            inputs_embeds: ``[B, N, hidden_size]`` in place of tokens.
            use_cache: Whether to make a cache if none is given; the configuration's word by
                default. Packed documents get none.
            documents: ``[B or 1, N]`` integers that never fall along a row, the document of each
                token: tokens attend within theirs.
            kwargs: ``output_hidden_states`` and ``return_dict``, as for all models of transformers.

        Returns:
            ``last_hidden_state`` ``[B, N, hidden_size]``, ``past_key_values``, ``hidden_states``.

        Raises:
            ValueError: If there are no tokens, shapes do not fit, the cache is another, documents
                come with a cache, an argument is not known, or the configuration's ``keep`` or
                ``window`` was set to what is no rule.
        """
        check_keep(self.config.keep, self.config.num_hidden_layers, self.config.window)
        _check_kwargs(kwargs, tells_documents=documents is not None or position_ids is not None)
        inputs_embeds = embedded(self.embed_tokens, input_ids, inputs_embeds)
        cache = lifetime_cache(past_key_values)
        slots = read_slots(
            inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            documents=documents,
            past=None if cache is None else cache.get_seq_length(),
        )
        if use_cache and cache is None and slots.documents is None:
            cache = LifetimeCache(self.config)
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, slots.position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                slots=slots,
                position_embeddings=position_embeddings,
                past_key_values=cache,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=cache
        )


class DmaForCausalLM(DmaPreTrainedModel, GenerationMixin):
    """The decoder with a language modeling head.

    ``generate`` uses a `LifetimeCache`, whose size does not grow with the text where ``keep`` is a
    number. With a share as ``keep`` it refuses ``prefill_chunk_size`` and assisted decoding.

    Args:
        config: Shape and options.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: DmaConfig):
        super().__init__(config)
        self.model = DmaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        documents: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model.

        Args:
            input_ids: As in `DmaModel.forward`, and so are all that are not named below.
            attention_mask: See there.
            position_ids: See there.
            past_key_values: See there.
            inputs_embeds: See there.
            labels: ``[B, N]`` tokens to predict, -100 for those that do not count; the model
                shifts them by one. The first token of a packed document should not count.
            use_cache: See there.
            logits_to_keep: Only the last so many logits (0: all), or those at these places.
            documents: See there.
            kwargs: See there; ``num_items_in_batch`` goes to the loss.

        Returns:
            ``loss`` if there are labels, ``logits`` ``[B, N or kept, vocab_size]``,
            ``past_key_values``, ``hidden_states``.

        Raises:
            ValueError: As there.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            documents=documents,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Give ``generate`` a `LifetimeCache` where transformers would make a ``DynamicCache``."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f'cache_implementation="{kind}" has no place for the scores of the keys: leave it '
                "out, or pass past_key_values=dynmask.dma.LifetimeCache()"
            )
        given = lifetime_cache(model_kwargs.get("past_key_values"))
        fresh = given is None or given.get_seq_length() == 0
        if fresh and isinstance(self.config.keep, float):
            self._check_share(generation_config, generation_mode)
        if given is not None:
            parent: Any = super()
            parent._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, *args, **kwargs
            )
        elif generation_config.use_cache is not False:
            cache = LifetimeCache(self.config)
            if generation_config.is_assistant:
                cache.activate_past_recording()  # What the main model refuses is taken back.
            model_kwargs["past_key_values"] = cache

    def _check_share(self, generation: GenerationConfig, mode: GenerationMode) -> None:
        """Refuse what makes the first call with a cache, which fixes ``w``, not the prompt."""
        share = f"keep={self.config.keep} is a share of the prompt's length, which "
        if generation.prefill_chunk_size is not None:
            raise ValueError(
                f"{share}its first chunk does not know: leave prefill_chunk_size out, or set "
                "config.keep to a number"
            )
        if mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                f"{share}a first call with the assistant's candidates does not know: leave "
                "assistant_model and prompt_lookup_num_tokens out, or set config.keep to a number"
            )


def _check_kwargs(kwargs: Mapping[str, Any], *, tells_documents: bool) -> None:
    """Refuse what would be lost without a word."""
    given = {name for name, value in kwargs.items() if value is not None and value is not False}
    if given & _PACKED and not tells_documents:
        raise ValueError(
            f"{', '.join(sorted(given & _PACKED))} are not read: give documents, or position_ids "
            "that start again in each document"
        )
    if "output_attentions" in given:
        raise ValueError("output_attentions=True: the maps of attention are never computed")
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal=False: the selection is causal")
    unknown = sorted(given - _HARMLESS - _PACKED)
    if unknown:
        raise ValueError(f"DmaModel knows no argument {', '.join(unknown)}: leave it out")
