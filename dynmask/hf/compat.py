"""What the rest of ``dynmask.hf`` needs to know about transformers' inside, found by probing.

A supported attention module takes its attention function from transformers' ``AttentionInterface``
and says so by three marks: an integer ``layer_idx``, a true ``is_causal`` and a modeling file that
imports ``ALL_ATTENTION_FUNCTIONS``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

# Arguments of an attention function that do not change the probabilities, or that dynmask honours
# in another way (the window and packing reach it through the mask). ``generate`` needs its
# tokenizer for stop strings, and hands it to the model as well.
_HARMLESS = frozenset(
    {
        "cache_position",
        "is_causal",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "sliding_window",
        "token_type_ids",
        "tokenizer",
        "use_cache",
    }
)

ATTACHED = "_dynmask_attached"
"""Attribute of an attention module while ``accelerate`` holds its model."""


@dataclass(frozen=True)
class AttentionLayer:
    """One causal self-attention module of a model.

    Args:
        index: Its ``layer_idx``.
        name: Dotted name inside the model.
        module: The attention module.
        depth: Place of its decoder layer in ``decoder_layers(model)``.
        own_window: Tokens that the model's own local mask lets a row see (sliding window or
            chunk), None for a layer that sees everything before it.
    """

    index: int
    name: str
    module: nn.Module
    depth: int
    own_window: int | None

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return int(self.module.config.num_attention_heads)  # type: ignore[union-attr,arg-type]


def register(
    name: str, attention: Callable[..., tuple[Tensor, Tensor | None]], mask: Callable[..., Any]
) -> None:
    """Register an attention function and its mask function under one name.

    Both are needed: transformers makes no mask at all for a name without a mask function.
    """
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def sdpa_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Run transformers' own ``sdpa`` attention function."""
    return AttentionInterface()["sdpa"](*args, **kwargs)


def sdpa_mask(**kwargs: Any) -> Tensor | None:
    """Make the mask that transformers makes for ``sdpa``: ``[B, 1, Q, K]`` bool or None."""
    return AttentionMaskInterface()["sdpa"](**kwargs)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return what autocast has torch's own attention make of a tensor; None to leave it."""
    kind = tensor.device.type
    if (
        tensor.dtype == torch.float64
        or not torch.amp.is_autocast_available(kind)
        or not torch.is_autocast_enabled(kind)
    ):
        return None
    return torch.get_autocast_dtype(kind)


def is_plain_causal(mask_function: Callable[..., Any]) -> bool:
    """Say whether a mask function is causal and nothing else (no window, packing or overlay)."""
    return mask_function is causal_mask_function


def refuse_unknown_arguments(
    module: nn.Module, arguments: Mapping[str, Any], *, is_causal: bool | None
) -> None:
    """Refuse what could change the attention probabilities without dynmask knowing how.

    Raises:
        ValueError: Naming the module's class and the argument, e.g. attention sinks (``s_aux``).
    """
    layer_type = type(module).__name__
    if is_causal is False:
        raise ValueError(f"{layer_type} asks for attention that is not causal (is_causal=False)")
    asked = {key for key, value in arguments.items() if value is not None and value is not False}
    unknown = sorted(asked - _HARMLESS)
    if unknown:
        raise ValueError(
            f"{layer_type} passes {', '.join(unknown)} to its attention function, which dynmask "
            "does not support: leave the argument out, or use this model without dynmask"
        )


def refuse_attached(model: nn.Module) -> None:
    """Refuse a model that ``accelerate`` holds, whole or in part.

    Raises:
        ValueError: If any module of the model is attached.
    """
    if any(ATTACHED in vars(module) for module in model.modules()):
        raise ValueError(
            "the model is inside accelerate() already: leave the with block, or call close() on "
            "the run, first"
        )


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a causal language model in the order in which they run.

    Raises:
        ValueError: If no supported attention module is found, or not all lie in one list.
    """
    return list(_layer_list(model)[1])


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """Find the causal self-attention modules of a model, in order.

    Raises:
        ValueError: If there is none, or they do not lie in one list of decoder layers.
    """
    prefix, layers = _layer_list(model)
    found = []
    for name, module in _attention_modules(model):
        depth = int(name[len(prefix) + 1 :].split(".", 1)[0])
        found.append(
            AttentionLayer(
                index=int(module.layer_idx),  # type: ignore[arg-type]
                name=name,
                module=module,
                depth=depth,
                own_window=_own_window(module),
            )
        )
    depths = [layer.depth for layer in found]
    if len(set(depths)) != len(depths) or len({layer.index for layer in found}) != len(found):
        raise ValueError(
            f"{type(model).__name__} has decoder layers with several self-attention modules "
            f"({type(layers[depths[0]]).__name__}), which dynmask does not support"
        )
    return found


def is_self_attention(module: nn.Module) -> bool:
    """Say whether a module carries the marks of causal self-attention."""
    return isinstance(getattr(module, "layer_idx", None), int) and (
        getattr(module, "is_causal", False) is True
    )


def context_limit(model: nn.Module) -> int | None:
    """Return the longest input the configuration allows, in tokens; None if it names none."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the language model inside ``model``."""
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no config: pass a transformers model")
    return config.get_text_config(decoder=True)


def _attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found = []
    for name, module in model.named_modules():
        if not is_self_attention(module):
            continue
        if not hasattr(getattr(module, "config", None), "_attn_implementation"):
            continue
        if hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS"):
            found.append((name, module))
    return found


def _layer_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the one ModuleList that holds every attention module, with its dotted name."""
    modules = _attention_modules(model)
    prefixes = set()
    for name, _ in modules:
        parts = name.split(".")
        # The outermost list counts: a decoder layer may hold lists of its own (experts).
        for end in range(len(parts)):
            prefix = ".".join(parts[:end])
            if isinstance(model.get_submodule(prefix), nn.ModuleList):
                prefixes.add(prefix)
                break
    if len(prefixes) != 1:
        if getattr(getattr(model, "config", None), "model_type", None) == "dma":
            raise ValueError(
                "this is a DMA model, which selects its keys by itself: use it without accelerate"
            )
        classes = sorted({type(m).__name__ for m in model.modules() if "ttention" in _kind(m)})
        raise ValueError(
            f"{type(model).__name__} has no attention layer that dynmask knows (attention classes "
            f"found: {', '.join(classes) or 'none'}): it needs causal self-attention modules with "
            "layer_idx in one list of decoder layers, using transformers' AttentionInterface"
        )
    prefix = prefixes.pop()
    layers = model.get_submodule(prefix)
    assert isinstance(layers, nn.ModuleList)
    return prefix, layers


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _own_window(module: Any) -> int | None:
    config = module.config
    kinds = getattr(config, "layer_types", None)
    window: int | None
    if kinds is None:
        window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    elif kinds[module.layer_idx] == "full_attention":
        window = None
    elif kinds[module.layer_idx] == "chunked_attention":
        window = getattr(config, "attention_chunk_size", None)
    else:
        window = getattr(config, "sliding_window", None)
    return window
