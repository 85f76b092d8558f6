"""The mask function of ``accelerate``: which key slots hold tokens, instead of a Q x K matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynmask.hf import compat
from dynmask.hf.callmask import CallMask, OwnMask
from dynmask.masks import Padding


class KeySlots(CallMask):
    """The key slots that one forward pass attends to, shared by its layers.

    Args:
        visible: ``[B, K]`` bool, True where slot j holds a real token. ``K`` counts every token so
            far, the queries' own included: the unused tail of a StaticCache is not in it.
        host: The same on the CPU, if it is there; else it is copied.

    Attributes:
        visible: As given.
        length: ``K``.
        host: The same on the CPU.
        whole: Whether every slot of every row holds a real token.
    """

    ndim = 2

    def __init__(self, visible: Tensor, *, host: Tensor | None = None):
        super().__init__()
        self.visible = visible
        self.length = visible.shape[1]
        # One copy to the host for the whole forward pass: on a GPU each would wait for the device.
        self.host = visible.cpu() if host is None else host
        self.whole = bool(self.host.all())
        self._padding: Padding | None = None
        self._dense: dict[int, Tensor] = {}
        self._sequences: dict[int, tuple[tuple[int, int], ...]] = {}

    @classmethod
    def all_real(cls, batch: int, length: int, device: Any) -> KeySlots:
        """Return ``length`` slots that all hold real tokens, without a wait for the device."""
        visible, host = (
            torch.ones(batch, length, dtype=torch.bool, device=where) for where in (device, "cpu")
        )
        return cls(visible, host=host)

    def to(
        self, device: Any = None, dtype: torch.dtype | None = None, **options: Any
    ) -> KeySlots | Tensor:
        """Return a copy on a device; with a ``dtype``, `visible` as ``attention_mask``."""
        visible = self.visible.to(device=device, dtype=dtype, **options)
        if dtype is not None:
            return visible
        if visible is self.visible:
            return self
        copy = KeySlots(visible, host=self.host)
        copy._runs = self._runs
        return copy

    @property
    def padding(self) -> Padding | None:
        """The runs of real tokens; None if every slot is real.

        Raises:
            ValueError: If the real tokens of a row are not one run.
        """
        if self._padding is None and not self.whole:
            self._padding = Padding.from_mask(self.host).to(self.visible.device)
        return self._padding

    @property
    def has_gaps(self) -> bool:
        """Whether the real tokens of some row are not one run."""
        return not self.whole and not self.sequences(1)

    def dense(self, q_len: int) -> Tensor | None:
        """Return the causal mask as transformers' ``sdpa`` function takes it.

        Args:
            q_len: Query rows ``Q``; they stand at the last Q key slots.

        Returns:
            ``[B or 1, 1, Q, K]`` bool, or None where ``sdpa`` needs no mask: no padding, and one
            query row or as many rows as keys.
        """
        if self.whole and q_len in (1, self.length):
            return None
        if q_len not in self._dense:
            slot = torch.arange(self.length, device=self.visible.device)
            causal = slot <= slot[self.length - q_len :, None]
            if not self.whole:
                causal = causal & self.visible[:, None, None, :]
            self._dense[q_len] = causal.expand(-1 if causal.ndim == 4 else 1, 1, -1, -1)
        return self._dense[q_len]

    def sequences(self, q_len: int) -> tuple[tuple[int, int], ...]:
        """Return each batch row's ``(first, length)``: its queries and tokens without padding.

        Rows whose tokens are not one run (possible where every head is dense) are left out.
        """
        if self.whole:
            return ((self.length - q_len, self.length),) * len(self.visible)
        if q_len not in self._sequences:
            try:
                runs = self.padding.runs(self.length) if self.padding is not None else []
            except ValueError:
                runs = []
            self._sequences[q_len] = tuple(
                (min(max(self.length - q_len, start), stop) - start, stop - start)
                for start, stop in runs
            )
        return self._sequences[q_len]


def row_by_row(
    attend: Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, str]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: KeySlots,
) -> tuple[Tensor, str]:
    """Attend to each batch row's sequence by itself, without its padding.

    Args:
        attend: Called as ``attend(b, query, key, value)`` with ``[1, H, q, D]`` and ``[1, G, k,
            D]``, a sequence whose last ``q`` tokens are the rows; returns ``[1, H, q, D]`` and what
            ran it.
        query: ``[B, H, Q, D]``.
        key: ``[B, G, K, D]``.
        value: ``[B, G, K, D]``.
        slots: The call's key slots.

    Returns:
        ``[B, H, Q, D]``, 0 in rows of padding, and what ran it.

    Raises:
        ValueError: The real tokens of a row are not one run.
    """
    out = torch.zeros_like(query)
    names: dict[str, None] = {}
    begin = slots.length - query.shape[2]
    padding = slots.padding
    whole = [(0, slots.length)] * len(query)
    for b, (start, stop) in enumerate(whole if padding is None else padding.runs(slots.length)):
        first = max(begin, start)
        if first >= stop:
            continue
        one, rows, keys = slice(b, b + 1), slice(first - begin, stop - begin), slice(start, stop)
        found = attend(b, query[one, :, rows], key[one, :, keys], value[one, :, keys])
        out[one, :, rows], name = found
        names[name] = None
    return out, ", ".join(names)


@torch.compiler.disable
def key_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | CallMask | None = None,
    **arguments: Any,
) -> CallMask:
    """Make the mask of one forward pass, as transformers' ``AttentionMaskInterface`` asks for it.

    Arguments are transformers' own; ``arguments`` are the further ones that go to its ``sdpa`` mask
    function unread.

    Returns:
        For plain causal attention `KeySlots`, the real key slots up to the last query's own (a
        StaticCache is cut to its used part). For anything else (sliding window, chunks, packed
        documents, overlays) `OwnMask`, the mask that transformers makes for ``sdpa``.

    Raises:
        ValueError: If ``attention_mask`` does not reach to the last token.
    """
    if isinstance(attention_mask, CallMask):
        return attention_mask  # ``generate`` has had it made before the call.
    if kv_offset != 0 or not compat.is_plain_causal(mask_function):
        # A skipped mask means plain causal to `sdpa`; only a window that is not full is that.
        if arguments.get("local_size") is None:
            arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask = compat.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **arguments,
        )
        return OwnMask(mask)
    length = min(kv_length, int(q_offset) + q_length)
    if attention_mask is None:
        return KeySlots.all_real(batch_size, length, arguments.get("device", "cpu"))
    if attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens of {length}: "
            "it must cover the cached tokens too"
        )
    return KeySlots(attention_mask[:, :length].bool().contiguous())


def slots_of(mask: KeySlots | None, key: Tensor, length: int) -> KeySlots:
    """Return the key slots behind a mask; without one, ``length`` slots, all of them real."""
    if mask is not None:
        return mask
    return KeySlots.all_real(key.shape[0], length, key.device)
