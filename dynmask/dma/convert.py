"""DMA models from checkpoints of others: Doge, and dense Llama, Qwen3 and Mistral models."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DogeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from dynmask.dma.configuration import DmaConfig
from dynmask.dma.modeling import DmaForCausalLM

logger = logging.getLogger(__name__)

DENSE = ("llama", "mistral", "qwen3")
"""Model types that `from_pretrained_dense` knows."""

_COMMON = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
    "initializer_range",
    "tie_word_embeddings",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def from_doge(model: PreTrainedModel | str | PathLike[str]) -> DmaForCausalLM:
    """Turn a Doge model into a `DmaForCausalLM`, of equal logits wherever no scores tie.

    That is: the logits of Doge with eager attention in float32, within rounding, of all tokens but
    padding (whose rows are 0 here and the mean of all tokens there), on inputs

    * of at most ``keep_window_size`` tokens, where nothing is dropped, or
    * longer ones where in no layer two keys of equal score compete for the last place of a row. Of
      equal scores the earlier key wins here; Doge's ``topk`` may take any of them. In layer 0 a
      score is a function of the token, so all occurrences of a token tie there, and on text that
      repeats tokens the two may keep different ones. With ``A = 0`` all keys of a layer tie.

    In float16 or bfloat16 Doge rounds the scores too, which makes more of them equal; here they are
    float32. A score above 148 goes on as a tangent here and as exp there (`dynmask.dma.score`).

    Args:
        model: A ``DogeForCausalLM``, the folder of a checkpoint, or its name on a hub (load the
            model yourself to choose dtype, device or revision). The model given is not changed and
            shares no memory with the result.

    Returns:
        The model, on the same device, in the same dtype, in the same mode.

    Raises:
        ValueError: If it is no causal Doge model, or uses what DMA models have not: experts
            (``is_moe``), a sliding window (where evicted keys return), biases of attention.

    Source: ``transformers.models.doge``; Doge by the authors of arXiv 2508.02124.
    """
    config = _config_of(model)
    if config.model_type != "doge":
        raise ValueError(
            f'"{config.model_type}" is no Doge model: use from_pretrained_dense for '
            f"{', '.join(DENSE)}"
        )
    for option in ("is_moe", "sliding_window", "attention_bias"):
        if getattr(config, option):
            raise ValueError(
                f"{option}={getattr(config, option)}: DMA models cannot run Doge models with it"
            )
    _warn_of_dropout(config, "attention_dropout", "hidden_dropout")
    doge = model if isinstance(model, PreTrainedModel) else DogeForCausalLM.from_pretrained(model)
    wanted = DmaConfig(
        **{name: getattr(config, name) for name in _COMMON},
        head_dim=getattr(config, "head_dim", None),
        mlp_bias=config.mlp_bias,
        keep=config.keep_window_size,
        residual_weights=True,
    )
    state = {
        name.replace(".self_attn.A", ".self_attn.score.A").replace(
            ".self_attn.dt_proj.", ".self_attn.score.dt_proj."
        ): weight
        for name, weight in doge.state_dict().items()
    }
    return _with_weights(wanted, state, doge)


def from_pretrained_dense(
    model: PreTrainedModel | str | PathLike[str],
    *,
    keep: int | float | Sequence[int | None] | None,
    threshold: float | None = None,
    score: str = "exp",
    a_std: float = 0.0,
) -> DmaForCausalLM:
    """Turn a dense model into a `DmaForCausalLM`, to train it on.

    With ``a_std=0`` all keys have the same score, a constant bias, which softmax does not notice:
    inputs of at most ``keep`` tokens (any input with ``keep=None``) give the dense model's logits.
    In longer ones equal scores keep the *earliest* ``keep`` keys, so that nothing later is read
    before training has moved ``A``; with ``a_std=0.02``, as in a new model, the start is a random
    choice by content instead.

    A sliding window (Mistral, some layers of Qwen3) is dropped with a warning: rows see chosen
    keys of the whole past. Up to the window's length that is the same.

    Args:
        model: A causal Llama, Qwen3 or Mistral model, the folder of a checkpoint, or its name on a
            hub (load the model yourself to choose dtype, device or revision). The model given is
            not changed and shares no memory with the result.
        keep: As in `DmaConfig`.
        threshold: As in `DmaConfig`.
        score: As in `DmaConfig`.
        a_std: Standard deviation of the initial ``A``; ``Wdt`` starts from
            ``N(0, initializer_range)``, by torch's global random numbers.

    Returns:
        The model, on the same device, in the same dtype, in the same mode.

    Raises:
        ValueError: If the model is of another type, or ``a_std`` is negative.
    """
    if a_std < 0:
        raise ValueError(f"a_std={a_std} must not be negative")
    config = _config_of(model)
    if config.model_type not in DENSE:
        other = "; use from_doge" if config.model_type == "doge" else ""
        raise ValueError(
            f'"{config.model_type}" models cannot be converted: known are {list(DENSE)}{other}'
        )
    wanted = DmaConfig(
        **{name: getattr(config, name) for name in _COMMON},
        head_dim=getattr(config, "head_dim", None),
        attention_bias=getattr(config, "attention_bias", False),
        mlp_bias=getattr(config, "mlp_bias", False),
        qk_norm=config.model_type == "qwen3",
        keep=list(keep) if isinstance(keep, Sequence) and not isinstance(keep, str) else keep,
        threshold=threshold,
        score=score,
    )
    _warn_of_dropout(config, "attention_dropout")
    if getattr(config, "sliding_window", None) is not None:
        logger.warning(
            "the sliding window of %s tokens is dropped: rows see chosen keys of the whole past",
            config.sliding_window,
        )
    if not isinstance(model, PreTrainedModel):
        model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False)
    state = dict(model.state_dict())
    groups = wanted.num_key_value_heads
    assert groups is not None
    for index in range(wanted.num_hidden_layers):
        like = state[f"model.layers.{index}.self_attn.v_proj.weight"]
        prefix = f"model.layers.{index}.self_attn.score"
        state[f"{prefix}.A"] = torch.randn(groups).mul(a_std).to(like)
        weight = torch.randn(groups, like.shape[0]).mul(wanted.initializer_range)
        state[f"{prefix}.dt_proj.weight"] = weight.to(like)
    return _with_weights(wanted, state, model)


def _config_of(model: PreTrainedModel | str | PathLike[str]) -> PreTrainedConfig:
    if not isinstance(model, PreTrainedModel):
        # transformers would look for it on the hub, and speak of repository names.
        if str(model).startswith((".", "/", "~")) and not Path(model).is_dir():
            raise ValueError(f"model: there is no folder {model}")
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no language modeling head: pass the causal model"
        )
    return model.config


def _warn_of_dropout(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name, None):
            logger.warning("%s=%s is dropped: DMA has no dropout", name, getattr(config, name))


def _with_weights(
    config: DmaConfig, state: dict[str, Tensor], source: PreTrainedModel
) -> DmaForCausalLM:
    """Return a model of these weights, copied, that generates by the source's settings."""
    config.dtype = source.dtype
    loaded: Any = DmaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict={name: weight.detach().clone() for name, weight in state.items()},
        dtype=source.dtype,
        output_loading_info=True,
    )
    made, info = loaded
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise ValueError(f"the weights do not fit a DMA model: {wrong}")
    if source.generation_config is not None:
        made.generation_config = copy.deepcopy(source.generation_config)
    return made.to(source.device).train(source.training)
