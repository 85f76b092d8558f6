"""The model of a recipe: fresh, of a named size, or from a checkpoint."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)

from dynmask.dma import DmaConfig, DmaForCausalLM
from dynmask.dma.convert import from_doge, from_pretrained_dense
from dynmask.train.recipe import Recipe

_CONFIGS: dict[str, type[PreTrainedConfig]] = {"llama": LlamaConfig, "dma": DmaConfig}
_MODELS: dict[str, type[PreTrainedModel]] = {"llama": LlamaForCausalLM, "dma": DmaForCausalLM}


def build_model(recipe: Recipe, *, vocab_size: int, **tokens: int | None) -> PreTrainedModel:
    """Make the recipe's model, in fp32.

    Besides the fields of its configuration, ``recipe.model`` may hold ``size``, the name of one of
    the paper's sizes (``dma`` only), or ``from``: a checkpoint of that type, whose weights are
    taken. Fields beside either change the configuration. For ``dma``, ``from`` may also be a Doge
    checkpoint, or a dense Llama, Qwen3 or Mistral one, which is converted; the latter with ``keep``
    (1,024 by default), ``threshold``, ``score`` and ``a_std``, as
    `dynmask.dma.convert.from_pretrained_dense` takes them.

    Args:
        recipe: what to make.
        vocab_size: tokens that the model has to know.
        tokens: ``eos_token_id`` and ``pad_token_id`` of the tokenizer.

    Raises:
        ValueError: a field that the configuration does not know or refuses, no such checkpoint, or
            a context or vocabulary that is too small.
    """
    fields = dict(recipe.model)
    kind, size, source = fields.pop("type"), fields.pop("size", None), fields.pop("from", None)
    known = _CONFIGS[kind]().to_dict()
    if unknown := sorted(set(fields) - set(known) - {"a_std"}):
        raise ValueError(
            f"recipe: model: unknown field {', '.join(unknown)}; known are size, from, "
            f"{', '.join(known)}"
        )
    if size is not None and (kind != "dma" or source is not None):
        raise ValueError(f"recipe: model: size={size!r} is for type dma, without from")
    set_seed(recipe.seed)
    try:
        if source is not None:
            model = _loaded(kind, str(source), fields)
        else:
            made = {"vocab_size": vocab_size, "bos_token_id": None, **tokens, **fields}
            config = DmaConfig.named(size, **made) if size else _CONFIGS[kind](**made)
            model = _MODELS[kind](config)
    except (OSError, TypeError, KeyError, ValueError) as error:
        origin = f"from={source}: " if source is not None else ""
        raise ValueError(f"recipe: model: {origin}{error}") from error
    config = model.config
    if config.vocab_size < vocab_size:
        raise ValueError(
            f"recipe: model: vocab_size={config.vocab_size} is less than the {vocab_size} tokens "
            f"of the data"
        )
    if config.max_position_embeddings < recipe.longest:
        raise ValueError(
            f"recipe: model: max_position_embeddings={config.max_position_embeddings} must be at "
            f"least {recipe.longest}, the longest phase"
        )
    return model


def _loaded(kind: str, source: str, fields: dict[str, Any]) -> PreTrainedModel:
    """Weights and configuration of a checkpoint, in fp32."""
    found = AutoConfig.from_pretrained(source).model_type
    if found == kind:
        return _MODELS[kind].from_pretrained(source, dtype="float32", **fields)
    if kind != "dma":
        raise ValueError(f"it is a {found} model, not a {kind} one")
    allowed = () if found == "doge" else ("keep", "threshold", "score", "a_std")
    if extra := sorted(set(fields) - set(allowed)):
        raise ValueError(
            f"{', '.join(extra)} cannot be changed while a {found} model is "
            f"converted, only {', '.join(allowed) or 'nothing'}; convert it first, then train from "
            f"the result"
        )
    if found == "doge":
        return from_doge(source).float()
    return from_pretrained_dense(source, **{"keep": 1024, **fields}).float()
