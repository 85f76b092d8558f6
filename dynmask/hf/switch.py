"""Give one model an attention implementation of its own, and take it back."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from dynmask.hf.compat import AttentionLayer

_IMPLEMENTATION = "_attn_implementation_internal"


class Switch:
    """Make ``model`` run its causal self-attention under another registered name.

    transformers reads the name from configuration objects, and two models built from one
    configuration share them. So the model's modules get private copies for the time of the switch;
    what the user changes in a copy meanwhile is carried over to the original by ``undo``.

    Args:
        model: The model; nothing outside it is touched.
        layers: Its attention layers, from ``attention_layers(model)``.
        name: The registered name of attention and mask function.
    """

    def __init__(self, model: nn.Module, layers: list[AttentionLayer], name: str):
        self._copies: dict[int, tuple[Any, Any, dict[str, Any]]] = {}
        self._holders: list[tuple[nn.Module, Any]] = []
        for module in model.modules():
            config = vars(module).get("config")
            if hasattr(config, "_attn_implementation"):
                self._holders.append((module, config))
        for module, config in self._holders:
            module.config = self._private(config)
        # The masks are made from the configuration of a module above the attention layers.
        held = {id(module) for module, _ in self._holders}
        for module in _ancestors(model, layers):
            if id(module) in held:
                config = module.config
                setattr(config.get_text_config(decoder=True), _IMPLEMENTATION, name)  # type: ignore[union-attr,operator]
        for layer in layers:
            setattr(layer.module.config, _IMPLEMENTATION, name)

    def _private(self, config: Any) -> Any:
        """Copy a configuration and those inside it, each once."""
        if id(config) not in self._copies:
            private = copy.copy(config)
            self._copies[id(config)] = (config, private, {})
            for key, value in vars(config).items():
                if hasattr(value, "_attn_implementation"):
                    vars(private)[key] = self._private(value)
            self._copies[id(config)][2].update(vars(private))
        return self._copies[id(config)][1]

    def undo(self) -> None:
        """Give every module its own configuration object back."""
        for module, config in self._holders:
            if vars(module).get("config") is self._copies[id(config)][1]:
                module.config = config
        for config, private, before in self._copies.values():
            for key, value in vars(private).items():
                changed = key not in before or before[key] is not value
                if changed and key != _IMPLEMENTATION:
                    vars(config)[key] = value


def _ancestors(model: nn.Module, layers: list[AttentionLayer]) -> list[nn.Module]:
    """Return the modules on the way from ``model`` to its attention layers."""
    names = {""}
    for layer in layers:
        parts = layer.name.split(".")
        names.update(".".join(parts[:end]) for end in range(1, len(parts)))
    return [model.get_submodule(name) for name in sorted(names)]
