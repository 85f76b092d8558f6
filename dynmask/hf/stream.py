"""Run a causal language model layer by layer, and hand out each layer's attention maps.

The model's own forward runs once for every layer and batch. Decoder layers before the wanted one
return their input, the wanted one gets the hidden states stored from the layer before, and an
exception ends the pass behind it. So embeddings, masks and rotary embeddings are the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dynmask.hf import compat
from dynmask.hf.switch import Switch

CAPTURE = "dynmask_capture"
_CONSUMER = "_dynmask_consumer"
# Heads of one map in memory at once: 8 maps of 1024 x 1024 are 32 MiB.
_HEADS_AT_ONCE = 8
# Rows of a soft-capped map at once: the whole map of a long sequence is never needed.
_ROWS_AT_ONCE = 256

Consumer = Callable[[int, Tensor, Tensor], None]
"""Called as ``consumer(first_head, probs, rows)`` for one sequence of ``N`` tokens: probs
``[h, R, N]`` float32, rows ``[R]`` int64, their positions, on the same device."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences padded on the right to one length.

    Args:
        input_ids: ``[B, L]`` int64.
        lengths: ``[B]`` int64, real tokens of each row.
    """

    input_ids: Tensor
    lengths: Tensor

    @property
    def attention_mask(self) -> Tensor:
        """``[B, L]`` int64, 1 where the slot holds a real token."""
        slot = torch.arange(self.input_ids.shape[1])
        return (slot < self.lengths[:, None]).long()


class StopForward(Exception):
    """Ends a forward pass behind the wanted layer."""


@dataclass
class _Capture:
    consumer: Consumer
    lengths: list[int]
    most_rows: int | None
    calls: int = 0


class LayerStream:
    """Steps of a model, one decoder layer at a time; a context manager.

    Inside the ``with`` block the model is in eval mode and patched; on leaving, also by an
    exception, everything is as before. Hidden states are kept by the caller, on the CPU.

    Args:
        model: A causal language model of transformers.

    Attributes:
        depth: Number of decoder layers.
        attention: The attention layer of each decoder layer that has one, by depth.

    Raises:
        ValueError: If the model has no attention layer that dynmask knows.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._layers = compat.decoder_layers(model)
        self._attention_layers = compat.attention_layers(model)
        self.depth = len(self._layers)
        self.attention = {layer.depth: layer for layer in self._attention_layers}
        self._wanted = 0
        self._stored: Tensor | None = None
        self._output: Tensor | None = None
        self._tuples: dict[int, int] = {}

    def __enter__(self) -> LayerStream:
        compat.register(CAPTURE, capture_attention, compat.sdpa_mask)
        self._training = [module for module in self.model.modules() if module.training]
        self._patched: list[tuple[nn.Module, bool, Any]] = []
        self._switch = Switch(self.model, self._attention_layers, CAPTURE)
        try:
            for module in self._training:
                module.training = False
            for depth, layer in enumerate(self._layers):
                self._patch(depth, layer)
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for layer, was_own, forward in self._patched:
            if was_own:
                layer.forward = forward
            else:
                del layer.forward
        for module in self._training:
            module.training = True
        self._switch.undo()
        self._stored = self._output = None

    def _patch(self, depth: int, layer: nn.Module) -> None:
        original = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            if depth < self._wanted:
                # Some layers return a tuple: the caller takes its first item.
                size = self._tuples.get(depth, 0)
                return (given, *[None] * (size - 1)) if size else given
            if self._stored is not None:
                stored = self._stored.to(given.device)
                if args:
                    args = (stored, *args[1:])
                else:
                    kwargs["hidden_states"] = stored
            out = original(*args, **kwargs)
            self._tuples[depth] = len(out) if isinstance(out, tuple) else 0
            self._output = out[0] if isinstance(out, tuple) else out
            raise StopForward

        self._patched.append((layer, "forward" in vars(layer), vars(layer).get("forward")))
        layer.forward = forward

    @torch.no_grad()
    def step(
        self,
        depth: int,
        batch: Batch,
        hidden: Tensor | None,
        consumer: Consumer | None = None,
        *,
        most_rows: int | None = None,
    ) -> Tensor:
        """Run one decoder layer on one batch.

        Args:
            depth: Which decoder layer, 0 first. Layers must be run in order.
            batch: The sequences.
            hidden: ``[B, L, hidden_size]``, what this method returned for ``depth - 1``; None for
                the first layer.
            consumer: Gets the layer's attention maps, one sequence and at most 8 heads at a time.
            most_rows: Only so many rows of each map are computed, as ``sample_rows`` chooses them;
                all by default.

        Returns:
            ``[B, L, hidden_size]`` on the CPU: the layer's output.

        Raises:
            ValueError: If maps are wanted and the layer never asked for attention, or asked for
                attention with arguments that dynmask does not know.
        """
        self._wanted, self._stored, self._output = depth, hidden, None
        weight = self.model.get_input_embeddings().weight  # type: ignore[operator]
        # An offloaded embedding is on the meta device; its hook moves the ids where it runs.
        device = "cpu" if weight.device.type == "meta" else weight.device
        layer = self.attention.get(depth)
        capture = None
        if consumer is not None and layer is not None:
            capture = _Capture(consumer, batch.lengths.tolist(), most_rows)
            setattr(layer.module, _CONSUMER, capture)
        try:
            self.model(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                use_cache=False,
            )
        except StopForward:
            pass
        finally:
            if capture is not None and layer is not None:
                delattr(layer.module, _CONSUMER)
        kind = type(self._layers[depth]).__name__
        if self._output is None:
            raise ValueError(f"{type(self.model).__name__} never ran its layer {depth} ({kind})")
        if capture is not None and capture.calls > 1:
            raise ValueError(
                f"layer {depth} ({kind}) attends {capture.calls} times a call, so it has no one map"
            )
        if consumer is not None and (capture is None or not capture.calls):
            raise ValueError(
                f"layer {depth} ({kind}) did not ask transformers' AttentionInterface for its "
                "attention, so its maps cannot be captured"
            )
        return self._output.cpu()


def capture_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attention function of the stream: transformers' ``sdpa``, and the maps beside it.

    Args:
        module: The attention module.
        query: ``[B, H, L, D]``.
        key: ``[B, G, L, D]``.
        value: ``[B, G, L, D]``.
        attention_mask: ``[B, 1, L, L]`` bool from transformers, or None for plain causal.
        dropout: Must be 0, as it is in eval mode.
        scaling: Factor of the logits, ``D ** -0.5`` by default.
        softcap: Logits become ``softcap * tanh(logits / softcap)``.
        is_causal: May only be True or None.
        **arguments: Further arguments; those that could change the maps are refused.

    Returns:
        ``[B, L, H, D]`` and None.

    Raises:
        ValueError: If an argument is refused.
    """
    compat.refuse_unknown_arguments(module, arguments, is_causal=is_causal)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    capture: _Capture | None = vars(module).get(_CONSUMER)
    if capture is not None:
        capture.calls += 1
        for row, length in enumerate(capture.lengths):
            rows_R = sample_rows(length, capture.most_rows).to(query.device)
            for first, probs_HRN in probabilities(
                query[row, :, :length],
                key[row, :, :length],
                None if attention_mask is None else attention_mask[row, 0, :length, :length],
                rows_R,
                scaling=scaling,
                softcap=softcap,
            ):
                capture.consumer(first, probs_HRN, rows_R)
    if softcap is None:
        return compat.sdpa_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling
        )
    out = torch.empty_like(query)
    group = query.shape[1] // key.shape[1]
    for row in range(len(query)):
        mask = None if attention_mask is None else attention_mask[row, 0]
        for rows_R in torch.arange(query.shape[2], device=query.device).split(_ROWS_AT_ONCE):
            for first, probs_HRN in probabilities(
                query[row], key[row], mask, rows_R, scaling=scaling, softcap=softcap
            ):
                last = first + len(probs_HRN)
                out[row, first:last, rows_R] = (
                    probs_HRN.to(value.dtype) @ value[row, first // group]
                )
    return out.transpose(1, 2).contiguous(), None


def sample_rows(length: int, most: int | None) -> Tensor:
    """Return at most ``most`` positions below ``length``, evenly spread from first to last.

    Args:
        length: Tokens ``N``, at least 1.
        most: Most positions, at least 2; None for all.

    Returns:
        ``[R]`` int64, ascending and unique, on the CPU.
    """
    if most is None or length <= most:
        return torch.arange(length)
    return torch.arange(most) * (length - 1) // (most - 1)


def probabilities(
    q_HND: Tensor,
    k_GND: Tensor,
    mask_NN: Tensor | None,
    rows_R: Tensor,
    *,
    scaling: float,
    softcap: float | None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield rows of a sequence's attention maps in float32, at most 8 heads of a kv head at once.

    Args:
        q_HND: ``[H, N, D]``.
        k_GND: ``[G, N, D]``.
        mask_NN: ``[N, N]`` bool, None for causal.
        rows_R: ``[R]`` int64, the wanted rows; no other row is computed.
        scaling: Factor of the logits.
        softcap: See ``capture_attention``.

    Yields:
        The first head's number and ``[h, R, N]`` float32.
    """
    heads, size, _ = q_HND.shape
    group = heads // len(k_GND)
    if mask_NN is None:
        hidden_RN = rows_R[:, None] < torch.arange(size, device=q_HND.device)
    else:
        hidden_RN = ~mask_NN[rows_R]
    q_HRD = q_HND[:, rows_R].float()
    for kv_head in range(len(k_GND)):
        k_DN = k_GND[kv_head].float().T
        for part in range(math.ceil(group / _HEADS_AT_ONCE)):
            first = kv_head * group + part * _HEADS_AT_ONCE
            last = min(first + _HEADS_AT_ONCE, (kv_head + 1) * group)
            logits_HRN = (q_HRD[first:last] @ k_DN).mul_(scaling)
            if softcap is not None:
                logits_HRN = logits_HRN.div_(softcap).tanh_().mul_(softcap)
            # The smallest number, not -inf: a row without any key stays finite, as in eager.
            logits_HRN = logits_HRN.masked_fill_(hidden_RN, torch.finfo(torch.float32).min)
            yield first, logits_HRN.softmax(-1)
