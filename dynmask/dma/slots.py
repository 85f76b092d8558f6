"""What the token slots of one forward pass hold: real tokens or padding, documents, positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers.masking_utils import find_packed_sequence_indices

from dynmask.masks import Documents, Padding


@dataclass(frozen=True)
class Slots:
    """The slots of the ``N`` new tokens of a forward pass, shared by its layers.

    Args:
        position_ids: ``[B or 1, N]`` int64, for RoPE.
        real: ``[B, N]`` bool, which slots hold real tokens; None if all do.
        documents: The document of each slot; None for one.
    """

    position_ids: Tensor
    real: Tensor | None = None
    documents: Documents | None = None

    @cached_property
    def padding(self) -> Padding | None:
        """The real tokens as one run a row.

        Raises:
            ValueError: If they are not one run.
        """
        if self.real is None:
            return None
        # By way of the host: checked there, and on a GPU each layer would wait for its numbers.
        return Padding.from_mask(self.real.cpu()).to(self.real.device)


def read_slots(
    embeds: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    documents: Tensor | None = None,
    past: int | None = None,
) -> Slots:
    """Read the slots from a model's arguments.

    Position ids that do not go on from one real token to the next start a new document, as in what
    transformers' ``DataCollatorWithFlattening`` makes. With a cache that is an error, like
    ``documents``, but seen on the CPU only: elsewhere looking would wait for the device.

    Args:
        embeds: ``[B, N, width]``, for its shape and device.
        attention_mask: ``[B, past + N]``, 1 where a slot holds a real token. None if all are real.
        position_ids: ``[B or 1, N]``. None counts each row's (each document's) tokens from 0.
        documents: ``[B or 1, N]`` integers that never fall along a row.
        past: Tokens that the cache has seen; None without a cache.

    Raises:
        ValueError: If there are no tokens, a shape does not fit, ids fall, or documents come with a
            cache, or the attention mask is one to be added to logits.
    """
    _check_tokens("the input", embeds)
    batch, length = embeds.shape[:2]
    device = embeds.device
    seen = past or 0
    if attention_mask is not None:
        _check_shape("attention_mask", attention_mask, (batch,), seen + length)
        _check_not_additive(attention_mask)
        attention_mask = attention_mask.to(device)
    if position_ids is not None:
        _check_shape("position_ids", position_ids, (1, batch), length)
        position_ids = position_ids.to(device)
    if documents is not None:
        _check_shape("documents", documents, (1, batch), length)
        documents = documents.to(device)
    elif position_ids is not None and (past is None or _can_look(length, device)):
        new = None if attention_mask is None else attention_mask[:, -length:]
        documents = _restarts(position_ids, new)
    if documents is not None and past is not None:
        raise ValueError(
            "documents, given as such or by position_ids that do not go on, cannot be told apart "
            "in a cache: pass use_cache=False and no past_key_values, or one document a row"
        )
    if position_ids is None:
        position_ids = _positions(attention_mask, documents, seen, length, device)
    return Slots(
        position_ids=position_ids,
        real=_real(attention_mask, length),
        documents=None if documents is None else Documents(documents),
    )


def embedded(
    embedding: Callable[[Tensor], Tensor], input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> Tensor:
    """Return a forward pass's tokens as vectors, ``[B, N, hidden_size]``.

    Args:
        embedding: Of the model.
        input_ids: ``[B, N]`` tokens, or
        inputs_embeds: ``[B, N, hidden_size]`` in their place.

    Raises:
        ValueError: If neither or both are given, or there are no tokens.
    """
    if inputs_embeds is not None and input_ids is None:
        return inputs_embeds
    if input_ids is None or inputs_embeds is not None:
        raise ValueError("give either input_ids or inputs_embeds")
    _check_tokens("input_ids", input_ids)  # A tokenizer's empty text is not even integer.
    return embedding(input_ids)


def _check_tokens(name: str, given: Tensor) -> None:
    if 0 in given.shape[:2]:
        raise ValueError(
            f"{name} is {list(given.shape)} and holds no token: give at least one row of one token"
        )


def _check_shape(name: str, given: Tensor, rows: tuple[int, ...], length: int) -> None:
    if given.dim() != 2 or given.shape[0] not in rows or given.shape[1] != length:
        raise ValueError(
            f"{name} is {list(given.shape)} but must be {[rows[-1], length]}: one entry for each "
            "token" + (", cached ones included, not a 4-d mask" if name == "attention_mask" else "")
        )


def _check_not_additive(attention_mask: Tensor) -> None:
    # Integers are what tokenizers give: no need to wait for the device.
    if not attention_mask.is_floating_point() or torch.compiler.is_compiling():
        return
    if bool(((attention_mask != 0) & (attention_mask != 1)).any()):
        raise ValueError(
            "attention_mask must hold only 0 and 1: give the tokenizer's, not one to be added to "
            "logits, where 0 means a real token"
        )


def _can_look(length: int, device: torch.device) -> bool:
    """Return whether numbers of a step with a cache can be read without waiting for the device."""
    return length > 1 and device.type == "cpu" and not torch.compiler.is_compiling()


def _restarts(position_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Return ``[B or 1, N]`` the documents that position ids tell apart; None if there are none."""
    if attention_mask is None:
        return find_packed_sequence_indices(position_ids)
    # Padding has positions of no meaning: each real token is compared with the real one before,
    # and whether positions count the padding between them is left open.
    real = attention_mask != 0
    slot = torch.arange(real.shape[1], device=real.device)
    before = torch.where(real, slot, -1).cummax(-1).values[:, :-1]
    positions = position_ids.expand(real.shape)
    rise = positions[:, 1:] - positions.gather(1, before.clamp_min(0))
    step = torch.zeros_like(real)
    step[:, 1:] = real[:, 1:] & (before >= 0) & ((rise < 1) | (rise > slot[1:] - before))
    return step.cumsum(-1) if torch.compiler.is_compiling() or bool(step.any()) else None


def _positions(
    attention_mask: Tensor | None,
    documents: Tensor | None,
    seen: int,
    length: int,
    device: torch.device,
) -> Tensor:
    if documents is not None:
        ids = documents.contiguous()
        return torch.arange(length, device=device) - torch.searchsorted(ids, ids)
    if attention_mask is not None:
        return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, seen:]
    return torch.arange(seen, seen + length, device=device)[None]


def _real(attention_mask: Tensor | None, length: int) -> Tensor | None:
    if attention_mask is None:
        return None
    real = attention_mask[:, -length:] != 0
    # Asking whether all are real waits for the device, which a step of decoding must not.
    whole = length > 1 and not torch.compiler.is_compiling() and bool(real.all())
    return None if whole else real
