"""The model of a recipe: fresh, of a named size, or from a checkpoint."""

from __future__ import annotations

import re
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.activations import ACT2FN

from dynmask.dma import DmaConfig, DmaForCausalLM
from dynmask.dma.convert import from_doge, from_pretrained_dense
from dynmask.dma.selection import check_keep
from dynmask.train.fields import check_names
from dynmask.train.recipe import Recipe
from dynmask.train.variants import MobaConfig, MobaForCausalLM, NsaConfig, NsaForCausalLM

_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "dma": DmaConfig,
    "mistral": MistralConfig,
    "deepseek_v3": DeepseekV3Config,
    "nsa": NsaConfig,
    "moba": MobaConfig,
}
_MODELS: dict[str, type[PreTrainedModel]] = {
    "llama": LlamaForCausalLM,
    "dma": DmaForCausalLM,
    "mistral": MistralForCausalLM,
    "deepseek_v3": DeepseekV3ForCausalLM,
    "nsa": NsaForCausalLM,
    "moba": MobaForCausalLM,
}
_START = "a_std"  # where the score starts: of a fresh model, or of a dense one's conversion
_NOT_OURS = ("model_type", "transformers_version")

# What configurations and models raise for values that cannot be; transformers has its own, too.
_REFUSALS = (
    OSError,
    TypeError,
    LookupError,
    ValueError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    StrictDataclassError,
)


def check_model(recipe: Recipe, *, vocab_size: int | None = None, **tokens: int | None) -> None:
    """Raise what `build_model` would, without computing a weight or loading one.

    Args:
        recipe: whose model to try.
        vocab_size: as for `build_model`; None before the data are known.
        tokens: as for `build_model`.

    Raises:
        ValueError: as `build_model`, save for what only a checkpoint's weights can show.
    """
    # Room for the id of any special token.
    config = _tried(recipe, 1 << 20 if vocab_size is None else vocab_size, tokens)
    if config is not None:
        _check_config(config, recipe, 0 if vocab_size is None else vocab_size)


def build_model(recipe: Recipe, *, vocab_size: int, **tokens: int | None) -> PreTrainedModel:
    """Make the recipe's model, in fp32.

    Types are those of transformers: ``llama`` for (grouped) multi-head attention, ``mistral`` with
    ``sliding_window``, ``deepseek_v3`` for multi-head latent attention, here with a plain MLP in
    every layer unless ``first_k_dense_replace`` says otherwise; and our own ``dma``, ``nsa``
    (`dynmask.train.variants.NsaConfig`) and ``moba`` (`dynmask.train.variants.MobaConfig`).

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
    kind, size, source, fields = _checked(recipe)
    set_seed(recipe.seed)
    try:
        if source is not None:
            model = _loaded(kind, str(source), fields)
        else:
            model = _MODELS[kind](_fresh(kind, size, fields, vocab_size, tokens))
    except _REFUSALS as error:
        raise _named(error, source, fields) from error
    _check_config(model.config, recipe, vocab_size)
    return model


def _checked(recipe: Recipe) -> tuple[str, str | None, str | None, dict[str, Any]]:
    """Type, size, source and the other fields; names and types of the latter are checked."""
    fields = dict(recipe.model)
    kind, size, source = fields.pop("type"), fields.pop("size", None), fields.pop("from", None)
    defaults = _CONFIGS[kind]()
    known = [name for name in defaults.to_dict() if name not in _NOT_OURS]
    check_names(fields, ["type", "size", "from", *known], "recipe: model")
    if size is not None and (kind != "dma" or source is not None):
        raise ValueError(f"recipe: model: size={size!r} is for type dma, without from")
    for name, value in fields.items():
        if name != "keep":  # which has several types, and is checked by DmaConfig
            _check_type(name, value, getattr(defaults, name, None))
    if fields.get("hidden_act", "silu") not in list(ACT2FN):
        raise ValueError(
            f"recipe: model: hidden_act={fields['hidden_act']!r} is not known: use one of "
            f"{', '.join(ACT2FN)}"
        )
    return kind, size, None if source is None else str(source), fields


def _check_type(name: str, value: Any, default: Any) -> None:
    """Refuse a plain value of another type than the default's; None and lists may be meant."""
    if not isinstance(value, bool | int | float | str):
        return
    if isinstance(default, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        fits, wanted = isinstance(value, int) and not isinstance(value, bool), "an integer"
    elif isinstance(default, float):
        fits, wanted = not isinstance(value, bool | str), "a number"
    elif isinstance(default, str):
        fits, wanted = isinstance(value, str), "a string"
    else:
        return
    if not fits:
        raise ValueError(f"recipe: model: {name}={value!r} must be {wanted}")


def _fresh(
    kind: str,
    size: str | None,
    fields: dict[str, Any],
    vocab_size: int,
    tokens: dict[str, int | None],
) -> PreTrainedConfig:
    made = {"vocab_size": vocab_size, "bos_token_id": None, **tokens, **fields}
    if kind == "deepseek_v3":
        # Its own defaults are for 128 heads, and put experts into all layers but three.
        layers = made.get("num_hidden_layers", DeepseekV3Config().num_hidden_layers)
        made = {"num_key_value_heads": None, "first_k_dense_replace": layers, **made}
    return DmaConfig.named(size, **made) if size else _CONFIGS[kind](**made)


def _tried(
    recipe: Recipe, vocab_size: int, tokens: dict[str, int | None]
) -> PreTrainedConfig | None:
    """The configuration, with which a model without weights was made; None if to be converted."""
    kind, size, source, fields = _checked(recipe)
    try:
        if source is None:
            config = _fresh(kind, size, fields, vocab_size, tokens)
        elif _type_of(kind, source, fields) == kind:
            config = _CONFIGS[kind].from_pretrained(source, **fields)
        else:
            return None
        with torch.device("meta"):
            _MODELS[kind](config)
    except _REFUSALS as error:
        raise _named(error, source, fields) from error
    return config


def _named(error: Exception, source: str | None, fields: dict[str, Any]) -> ValueError:
    """The same in one line, which names the fields that were given if ``error`` names none."""
    text = " ".join(str(error).split())
    origin = f"from={source}: " if source is not None else ""
    if fields and not any(re.search(rf"\b{re.escape(name)}\b", text) for name in fields):
        given = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        text = f"{text} (given are {given})"
    return ValueError(f"recipe: model: {origin}{text}")


def _check_config(config: PreTrainedConfig, recipe: Recipe, vocab_size: int) -> None:
    if config.vocab_size < vocab_size:
        raise ValueError(
            f"recipe: model: vocab_size={config.vocab_size} is less than the {vocab_size} tokens "
            f"of the data"
        )
    if isinstance(config, DmaConfig):
        # What a recipe changes in a checkpoint's configuration is set after its own check.
        try:
            check_keep(config.keep, config.num_hidden_layers, config.window)
        except ValueError as error:
            raise ValueError(f"recipe: model: {error}") from error
    if config.max_position_embeddings < recipe.longest:
        raise ValueError(
            f"recipe: model: max_position_embeddings={config.max_position_embeddings} must be at "
            f"least {recipe.longest}, the longest phase"
        )


def _type_of(kind: str, source: str, fields: dict[str, Any]) -> str:
    """The type of a checkpoint, from which ``kind`` can be had with these fields."""
    found = str(AutoConfig.from_pretrained(source, trust_remote_code=False).model_type)
    if found == kind:
        if _START in fields:
            raise ValueError(
                f"{_START} is for a fresh model or a dense one's conversion, and this is a {found} "
                f"model with scores of its own"
            )
        return found
    if kind != "dma":
        raise ValueError(f"it is a {found} model, not a {kind} one")
    allowed = () if found == "doge" else ("keep", "threshold", "score", _START)
    if extra := sorted(set(fields) - set(allowed)):
        raise ValueError(
            f"{', '.join(extra)} cannot be changed while a {found} model is "
            f"converted, only {', '.join(allowed) or 'nothing'}; convert it first, then train from "
            f"the result"
        )
    return found


def _loaded(kind: str, source: str, fields: dict[str, Any]) -> PreTrainedModel:
    """Weights and configuration of a checkpoint, in fp32."""
    found = _type_of(kind, source, fields)
    if found == kind:
        return _MODELS[kind].from_pretrained(source, **{**fields, "dtype": "float32"})
    if found == "doge":
        return from_doge(source).float()
    return from_pretrained_dense(source, **{"keep": 1024, **fields}).float()
