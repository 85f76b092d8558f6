"""Keys and values of heads that run on fixed stripes, without those that no later row can see."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dynmask.dam.static_tables import NOWHERE, LastRows, RowTables, in_corner
from dynmask.masks import Stripes

SLACK = 64
"""Last tokens that `StaticKeys.crop` can always take back."""

# A tensor made in inference mode could not be written outside of it.
outlasts_inference_mode = torch.inference_mode(False)


class StaticKeys:
    """Keys and values of kv heads whose query heads all run on stripes.

    Row ``i`` sees key ``j`` if ``j`` is a column, ``i - j`` an offset, or the corner shows it. So a
    key that is no column is seen last by row ``j + (largest offset)``, or by the corner's last row
    that shows it, and `evict` gives it up when that row and `SLACK` more tokens have passed.
    What is left are the columns, the keys within the largest offset, and `SLACK` keys.

    Every kv head has as many slots as the one that keeps most: the others' are empty. Where heads
    differ much, one `StaticKeys` a kv head wastes nothing.

    Where each key stands is known on the host, so that nothing waits for the device, as long as
    ``real`` is None or on the CPU. Gradients do not flow into kept keys.

    Args:
        stripes: Of these heads alone, ``H``, none of them full, without padding. What is derived
            from them is kept with them, so give the same object to the next `StaticKeys`; where the
            keys live, or their corner is copied there.
        groups: ``G``, kv heads.

    Attributes:
        tokens: Seen so far, padding and those given up included.

    Raises:
        ValueError: If the stripes have full heads or padding, or ``H`` is no multiple of ``G``.
    """

    def __init__(self, stripes: Stripes, groups: int):
        if stripes.padding is not None:
            raise ValueError("stripes are padded: pass stripes.unpadded, and real= with the tokens")
        if bool(stripes.full_heads.any()):
            raise ValueError(
                "stripes have full heads, whose rows see every key: pass stripes.of_heads(...) of "
                "the others"
            )
        if groups < 1 or stripes.heads % groups:
            raise ValueError(f"groups={groups} must divide the {stripes.heads} heads of stripes")
        self._stripes = stripes
        self._groups = groups
        self._last_rows = LastRows.of(stripes, groups)
        self.reset()

    @outlasts_inference_mode
    def reset(self) -> None:
        """Forget all tokens."""
        self.tokens = 0
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self._owned = False
        # [2, B or 1, G, capacity] int32 on the CPU: which token is in a slot, and its position
        # among its sequence's real tokens. NOWHERE: an empty slot; padding has no position. Slots
        # not yet used hold what real tokens will write there. The last SLACK used slots, or all
        # while nothing was given up, are the last tokens, in every kv head alike.
        self._where = torch.empty(2, 1, self._groups, 0, dtype=torch.int32)
        self._real = torch.zeros(1, dtype=torch.int32)  # [B or 1], real tokens so far.
        self._padded = False
        self._used = 0
        self._checked = 0  # Tokens when evict last looked what there is to give up.
        self._exact_from = 0  # Rows from this token on see no key that was given up.
        self._lookup: tuple[Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory held for tokens; of the tensors given if they are still in use."""
        held = [self._k, self._v, self._where, *(self._lookup or ())]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage() for t in held if t is not None
        }
        return sum(storage.nbytes() for storage in storages.values())

    @outlasts_inference_mode
    def append(self, k: Tensor, v: Tensor, real: Tensor | None = None) -> None:
        """Take in new tokens.

        The first ones are used where they are until the next `append` or `evict`, so that a long
        prompt is not held twice: do not write to them.

        Args:
            k: ``[B, G, n, D]``, finite, any strides.
            v: ``[B, G, n, D]``.
            real: ``[B, n]`` bool, False for padding, anywhere: it is seen by no row and counts as
                no position. None for all True. On a GPU it makes the host wait.

        Raises:
            ValueError: If shapes, dtype or device do not fit what is held; nothing is changed.
        """
        self._check(k, v, real)
        k, v, count = k.detach(), v.detach(), k.shape[2]
        real = None if real is None else real.cpu()
        if real is not None and bool(real.all()):
            real = None
        if self._k is None:
            self._k, self._v = k, v
            self._where = _with_slots(self._where, count)
            self._fill_room()
        else:
            new = slice(self._used, self._used + count)
            for held, tokens in zip(self._with_room(count), (k, v), strict=True):
                held[:, :, new] = tokens
        if real is not None and not self._padded:
            self._where = self._where.expand(-1, len(real), -1, -1).clone()
            self._real = self._real.expand(len(real)).clone()
            self._padded = True
        first = self._used
        self._used += count
        self.tokens += count
        if real is None:
            self._real += count
        else:
            position = self._real[:, None] + real.cumsum(1, dtype=torch.int32) - 1
            position[~real] = NOWHERE
            self._where[1, :, :, first : self._used] = position[:, None]
            self._real += real.sum(1)
            self._fill_room()

    @outlasts_inference_mode
    def evict(self) -> None:
        """Give up the keys that no row from the last `SLACK` tokens on can see.

        Cheap enough for every step: it does nothing until `SLACK` tokens came since it last
        looked. What stays is copied, so the memory of the rest is free.
        """
        if self.tokens - self._checked < SLACK:
            return
        self._checked = self.tokens
        old = self._used - SLACK
        last = self._where[1, :, 0, old : self._used]
        row = self._real - (last != NOWHERE).sum(1)
        stays = self._last_rows.see(self._where[1, :, :, :old], row)
        size = int(stays.sum(2).max())
        if size == old:
            return
        slots = torch.zeros(*stays.shape[:2], size + 2 * SLACK, dtype=torch.int64)
        where = _with_slots(self._where[..., :0], size + 2 * SLACK)
        for b, g in product(range(len(stays)), range(self._groups)):
            kept = stays[b, g].nonzero().flatten()
            slots[b, g, size - len(kept) : size] = kept
            where[:, b, g, size - len(kept) : size] = self._where[:, b, g, kept]
        slots[:, :, size : size + SLACK] = torch.arange(old, self._used)
        where[..., size : size + SLACK] = self._where[..., old : self._used]
        assert self._k is not None
        assert self._v is not None
        slots = slots.to(self._k.device)
        self._k, self._v = _taken(self._k, slots), _taken(self._v, slots)
        self._owned = True
        self._where = where
        self._used = size + SLACK
        self._exact_from = self.tokens - SLACK
        self._fill_room()

    def attend(self, q: Tensor, scale: float | None = None) -> Tensor:
        """Attend from the last tokens to what they see; dense over what is held, so for few rows.

        Args:
            q: ``[B, H, Q, D]``, of the last ``Q`` tokens.
            scale: Factor of the logits; ``1 / sqrt(D)`` by default.

        Returns:
            ``[B, H, Q, D]``, 0 in rows of padding.

        Raises:
            ValueError: If shapes do not fit, or keys that these rows see were given up.
        """
        batch, heads, q_len, dim = q.shape
        k, v = self._k, self._v
        if (
            k is None
            or v is None
            or (batch, heads, dim) != (len(k), self._stripes.heads, k.shape[3])
        ):
            raise ValueError(
                f"q must be [B, {self._stripes.heads}, Q, D] of tokens that were appended, got "
                f"{list(q.shape)}" + ("" if k is None else f" for keys {list(k.shape)}")
            )
        if not 1 <= q_len <= self.tokens - self._exact_from:
            raise ValueError(
                f"q has {q_len} rows, and 1 to {self.tokens - self._exact_from} can be attended: "
                "append the tokens and attend before evict"
            )
        position, in_columns = self._looked_up(k.device)
        begin, used = self._used - q_len, self._used
        position, in_columns = position[:, :, :used], in_columns[:, :, :, :used]
        rows = position[:, 0, begin:]
        tables = RowTables.of(self._stripes, self._groups, k.device)
        seen = tables.seen(rows, position, in_columns)
        corner = self._stripes.corner
        if corner is not None and int(self._where[1, :, 0, begin:used].min()) < corner.shape[1]:
            seen |= in_corner(corner.to(k.device), tables.head, rows, position)
        # The query heads of a kv head as rows: no key is repeated. Every row sees its own key, and
        # one of padding the others.
        out = scaled_dot_product_attention(
            q.reshape(batch, self._groups, -1, dim),
            k[:, :, :used],
            v[:, :, :used],
            attn_mask=seen.flatten(2, 3),
            scale=scale,
        ).view(q.shape)
        return out.masked_fill(rows[:, None, :, None] == NOWHERE, 0) if self._padded else out

    def expanded(self) -> tuple[Tensor, Tensor]:
        """Return ``k`` and ``v`` ``[B, G, N, D]`` of all tokens, with 0 where they were given up.

        Under the stripes, rows from the last `SLACK` tokens on, and all since `evict`, see only
        keys that are held: ``attention(q, *keys.expanded(), stripes & padding)``.

        Raises:
            ValueError: If there are no tokens.
        """
        if self._k is None or self._v is None:
            raise ValueError("there are no tokens: append some first")
        # Empty slots go behind the last token.
        token = self._where[0, :, :, : self._used].clamp_max(self.tokens).long()
        token = token.to(self._k.device)[..., None]

        def spread(source: Tensor) -> Tensor:
            batch, groups, _, dim = source.shape
            out = source.new_zeros(batch, groups, self.tokens + 1, dim)
            return out.scatter_(2, token.expand(batch, -1, -1, dim), source)[:, :, :-1]

        return spread(self._k[:, :, : self._used]), spread(self._v[:, :, : self._used])

    def crop(self, count: int) -> None:
        """Take the last ``count`` tokens back; `SLACK` always can be.

        Raises:
            ValueError: If rows from there on see keys that were given up, or there are not so many
                tokens; nothing is changed.
        """
        self.check_crop(count)
        left = self._used - count
        gone = self._where[1, :, 0, left : self._used]
        self._real -= (gone != NOWHERE).sum(1)
        self._used = left
        self.tokens -= count
        if self._padded:
            self._fill_room()

    def check_crop(self, count: int) -> None:
        """Change nothing.

        Raises:
            ValueError: `crop` would refuse.
        """
        if not 0 <= count <= self.tokens - self._exact_from:
            raise ValueError(
                f"the last {count} tokens cannot be taken back: only "
                f"{self.tokens - self._exact_from} can, since keys that no later row sees were "
                "given up; begin again with the tokens that are to stay, or evict later"
            )

    @outlasts_inference_mode
    def select(self, indices: Tensor) -> None:
        """Take batch rows ``indices [n]``, as beam search does.

        After padding it makes the host wait for indices on a GPU.
        """
        if self._k is None or self._v is None:
            return
        index = indices.to(self._k.device)
        self._k, self._v = self._k[index], self._v[index]
        if self._padded:
            index = indices.cpu()
            self._where, self._real = self._where[:, index], self._real[index]
            self._lookup = None

    def repeat(self, count: int) -> None:
        """Repeat each batch row ``count`` times."""
        if self._k is not None:
            self.select(torch.arange(len(self._k)).repeat_interleave(count))

    @outlasts_inference_mode
    def __deepcopy__(self, memo: dict[int, Any]) -> StaticKeys:
        # Stripes never change, and what is derived from them is large.
        memo[id(self._stripes)], memo[id(self._last_rows)] = self._stripes, self._last_rows
        copied = object.__new__(StaticKeys)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(vars(self), memo))
        return copied

    def _check(self, k: Tensor, v: Tensor, real: Tensor | None) -> None:
        like = k if self._k is None else self._k
        fits = k.dim() == 4 and k.shape[1] == self._groups and k.shape[2] >= 1
        if not fits or v.shape != k.shape or (k.shape[0], k.shape[3]) != (len(like), like.shape[3]):
            raise ValueError(
                f"k and v must be [B, {self._groups}, n, D] with n >= 1 and the B and D of earlier "
                f"ones, got {list(k.shape)} and {list(v.shape)}"
            )
        if any((t.dtype, t.device) != (like.dtype, like.device) for t in (k, v)):
            raise ValueError(
                f"k and v must be {like.dtype} on {like.device}, got {k.dtype} on {k.device} and "
                f"{v.dtype} on {v.device}: one dtype and device for all tokens"
            )
        if real is not None and (real.shape != k.shape[::2] or real.dtype != torch.bool):
            raise ValueError(
                f"real must be {list(k.shape[::2])} bool, got {list(real.shape)} {real.dtype}: "
                "pass attention_mask[:, -n:].bool() for n new tokens"
            )

    def _with_room(self, count: int) -> tuple[Tensor, Tensor]:
        """Return keys and values with room for ``count`` more, in new memory if need be."""
        assert self._k is not None
        assert self._v is not None
        used = self._used
        if not self._owned or used + count > self._k.shape[2]:
            room = count + max(SLACK, used // 4)
            self._k, self._v = (_with_room(t[:, :, :used], room) for t in (self._k, self._v))
            self._owned = True
            self._where = _with_slots(self._where[..., :used], room)
            self._fill_room()
        return self._k, self._v

    def _fill_room(self) -> None:
        """Write where real tokens will stand into the slots that are not used yet."""
        room = torch.arange(self._where.shape[3] - self._used, dtype=torch.int32)
        self._where[0, :, :, self._used :] = self.tokens + room
        self._where[1, :, :, self._used :] = (self._real[:, None] + room)[:, None]
        self._lookup = None

    def _looked_up(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return ``[B or 1, G, S]`` positions and which of them are columns, on ``device``."""
        if self._lookup is None:
            position = self._where[1].to(device)
            tables = RowTables.of(self._stripes, self._groups, device)
            self._lookup = position, tables.in_columns(position)
        return self._lookup


def _with_room(source: Tensor, room: int) -> Tensor:
    """Return a copy of ``[B, G, n, D]`` in ``n + room`` slots."""
    batch, groups, used, dim = source.shape
    out = source.new_empty(batch, groups, used + room, dim)
    out[:, :, :used] = source
    return out


def _taken(source: Tensor, slots: Tensor) -> Tensor:
    """Return ``[B, G, n, D]``, a copy of ``source`` at ``slots [B or 1, G, n]``."""
    return source.gather(2, slots[..., None].expand(len(source), -1, -1, source.shape[3]))


def _with_slots(where: Tensor, count: int) -> Tensor:
    """Return a copy with more slots, empty ones."""
    return torch.nn.functional.pad(where, (0, count), value=NOWHERE)
