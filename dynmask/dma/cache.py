"""The cache of a DMA model: at most w keys for each kv head, and all that generation asks of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from dynmask.dma.cache_layer import LifetimeLayer, without_score
from dynmask.masks import Lifetimes


class LifetimeCache(Cache):
    """A transformers ``Cache`` of the ``keep`` keys that later rows need, for each kv head.

    A DMA layer hands its new tokens and their scores to `extend` and attends to what it returns:
    the output is that over all tokens so far, while memory stops growing at ``keep`` tokens. The
    kept k, v and scores are bit for bit those of the whole cache. So are outputs where a backend
    gathers the keys that a row sees (``attention(impl="cpu")`` on both sides): keys come in order
    of arrival on the CPU. Other kernels add in another order and agree within rounding.

    Works with greedy search, sampling, beams, assisted decoding, chunked prefill and padding at
    either side. It cannot be compiled as a static cache can: `extend` always runs as it is, and
    breaks the graph of a compiled model in every layer (``fullgraph=True`` raises).

    Args:
        config: Of the model; fixes the number of layers. None makes layers as they are used.
        offloading: Hold the layers that are not at work in the CPU's memory, as transformers'
            offloaded caches do. Needs CUDA.

    Example:
        >>> import torch
        >>> cache = LifetimeCache()
        >>> k = v = torch.randn(1, 2, 100, 16)
        >>> k, v, bias, mask = cache.extend(k, v, torch.randn(1, 2, 100), 0, keep=10)
        >>> k.shape[2], cache.get_seq_length(), cache.memory()
        (100, 100, 2800)
    """

    def __init__(self, config: Any = None, *, offloading: bool = False) -> None:
        if config is None:
            super().__init__(layer_class_to_replicate=LifetimeLayer, offloading=offloading)
        else:
            count = config.get_text_config(decoder=True).num_hidden_layers
            layers: list[Any] = [LifetimeLayer() for _ in range(count)]
            super().__init__(layers=layers, offloading=offloading)
        self._lead: int | None = None

    # The shapes it holds grow and how it holds them changes: each step would be traced anew.
    @torch.compiler.disable
    def extend(
        self,
        k: Tensor,
        v: Tensor,
        score: Tensor,
        layer_idx: int,
        *,
        keep: int | None,
        threshold: float | None = None,
        window: int = 0,
        present: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Lifetimes]:
        """Take in a layer's new tokens, and return what their rows attend to.

        Args:
            k: ``[B, G, Q, D]``, after rotary embedding.
            v: ``[B, G, Q, D]``.
            score: ``[B, G, Q]`` float, compared and kept in float32.
            layer_idx: Number of the layer, from 0.
            keep: ``w``, keys that a row sees; None for all, and then memory grows. The first call
                of a layer fixes it.
            threshold: Keys whose score is lower, or NaN, are never admitted. None admits all. Fixed
                by the first call too.
            window: Nearest real tokens that a row sees whatever their scores, its own included; the
                older ones compete for the other places of ``keep``. Fixed by the first call too.
            present: ``[B, Q]`` bool, False where a token is padding; None for all True.

        Returns:
            ``k`` and ``v`` ``[B, G, K, D]``, the score ``[B, G, K]`` float32 as ``bias``, and the
            mask: arguments of `dynmask.attention` for Q query rows, good until the next call.

        Raises:
            ValueError: If the tokens do not fit what the cache holds: another model, batch size,
                ``keep``, ``threshold`` or ``window``; or ``window`` is not from 0 to ``keep``.
                Nothing is changed then.
        """
        self._check_layer(layer_idx, k.shape[2])
        step = {"keep": keep, "threshold": threshold, "window": window, "present": present}
        attended: Any = super().update(k, v, layer_idx, score, **step)
        (k, v), (bias, mask) = attended
        return k, v, bias, mask

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: without a score nothing can be kept.

        Raises:
            ValueError: Always.
        """
        raise without_score()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens in all layers, or in none; see `LifetimeLayer.crop`.

        Raises:
            ValueError: If a layer cannot.
        """
        used = [layer for layer in self._lifetimes if layer.is_initialized]
        for layer in used:
            layer.check_crop(tokens_to_remove)
        for layer in used:
            layer.crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Hold new tokens until the next `crop`, which can then remove them."""
        super().activate_past_recording()
        if self.layer_class_to_replicate is not None:  # Layers to come record as well.
            recording: Any = partial(LifetimeLayer, record_past=True)
            self.layer_class_to_replicate = recording

    def memory(self) -> int:
        """Return the bytes of all tensors held."""
        return sum(layer.memory() for layer in self._lifetimes)

    @property
    def _lifetimes(self) -> list[LifetimeLayer]:
        layers: list[Any] = self.layers
        return layers

    def _check_layer(self, layer_idx: int, count: int) -> None:
        """Refuse a step that leaves layers behind each other, as another model's would."""
        layers = self._lifetimes
        if layer_idx >= len(layers) and self.layer_class_to_replicate is None:
            raise ValueError(
                f"layer {layer_idx} of a cache that was made for {len(layers)} layers: make a new "
                "LifetimeCache for another model"
            )
        lead = layers[self._lead] if self._lead is not None else None
        if lead is None or not lead.is_initialized:
            self._lead = layer_idx
            return
        seen = layers[layer_idx].get_seq_length() if layer_idx < len(layers) else 0
        if layer_idx == self._lead:
            fits = not layers[-1].is_initialized or layers[-1].get_seq_length() == seen
        else:
            fits = seen + count == lead.get_seq_length()
        if not fits:
            raise ValueError(
                f"layer {layer_idx} has seen {seen} tokens, which does not fit the other layers: "
                "the cache was filled by another model, or a pass was cut off; make a new "
                "LifetimeCache, or empty this one with reset()"
            )
