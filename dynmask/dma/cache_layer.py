"""One layer of a DMA model's cache: all tokens while they fit, then at most w keys a kv head."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from dynmask.dma.nearest import select_tokens
from dynmask.dma.tokens import Tokens
from dynmask.dma.windowed import WindowedKeys, kept_keys
from dynmask.masks import Lifetimes
from dynmask.ops.bounded import BoundedKeys
from dynmask.ops.bounded_rules import check_present

Attended = tuple[tuple[Tensor, Tensor], tuple[Tensor, Lifetimes]]
"""``(k, v), (score, mask)``: what the new rows attend to. A pair, as transformers' caches give."""


class LifetimeLayer(CacheLayerMixin):
    """One decoder layer's part of a `LifetimeCache`.

    As long as all tokens fit ``keep``, they are all held and can be cropped. The first call that
    exceeds it moves them into `BoundedKeys` (with a window: `WindowedKeys`), where memory no longer
    grows. While past recording is on (``activate_past_recording``), new tokens are held beside the
    bounded keys until `crop`.

    Attributes:
        keep: Keys that a row sees, as the first call gave it; None for all.
        threshold: Lowest score that is admitted, as the first call gave it; None for any.
        window: Nearest keys that a row sees whatever their scores, as the first call gave it.
        record_past: Whether `crop` can remove the tokens since the last `crop`, evicted or not.
        keys: None; they are not in transformers' form.
        values: None.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, *, record_past: bool = False) -> None:
        super().__init__()
        self.record_past = record_past
        self._forget()

    def _forget(self) -> None:
        self.keep: int | None = None
        self.threshold: float | None = None
        self.window = 0
        self.is_initialized = False
        self._kept: BoundedKeys | WindowedKeys | None = None
        self._recent: Tokens | None = None
        self._seen = 0
        self._used = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note batch size, kv heads, head size, dtype and device; every later call must agree."""
        self.device = key_states.device
        self._shape = _shape_of(key_states)
        self.is_initialized = True

    def update(  # type: ignore[override]
        self,
        key_states: Tensor,
        value_states: Tensor,
        score: Tensor | None = None,
        *,
        keep: int | None = None,
        threshold: float | None = None,
        window: int = 0,
        present: Tensor | None = None,
    ) -> Attended:
        """Take in new tokens; see `LifetimeCache.extend`.

        Returns:
            ``(k, v), (score, mask)``.

        Raises:
            ValueError: Without a score, or if the call does not fit what the layer holds.
        """
        if score is None:
            raise without_score()
        self._check(key_states, value_states, score, present)
        self._check_rule(keep, threshold, window)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self._used:
            self.keep, self.threshold, self.window, self._used = keep, threshold, window, True
        new = Tokens(key_states, value_states, score.float(), present)
        self._seen += len(new)
        if self._kept is not None and not self.record_past:
            if self._recent is not None:
                self._commit()
            return self._bounded(self._kept, new)
        tokens = new if self._recent is None else self._recent + new
        if self._kept is not None:
            self._recent = tokens
            return _attended(*_extend(self._kept, tokens, commit=False))
        if keep is not None and len(tokens) > keep and not self.record_past:
            self._kept, self._recent = self._make_bounded(tokens), None
            return _attended(*_extend(self._kept, tokens))
        self._recent = tokens
        return self._whole(tokens, len(new))

    def _bounded(self, kept: BoundedKeys | WindowedKeys, new: Tokens) -> Attended:
        if len(new) > 1:
            return _attended(*_extend(kept, new))
        present = None if new.present is None else new.present[:, 0]
        kept.insert(new.k, new.v, new.score, present)
        # In order of arrival, sums over the keys are those over the whole cache, bit for bit. On a
        # GPU that would cost what the kernel saves.
        return _attended(*kept.view(by_arrival=not new.k.is_cuda))

    def _whole(self, tokens: Tokens, rows: int) -> Attended:
        count = len(tokens)
        mask = select_tokens(
            tokens.score,
            count if self.keep is None else self.keep,
            self.window,
            threshold=self.threshold,
            real=tokens.present,
            offset=count - rows,
        )
        return _attended(tokens.k, tokens.v, tokens.score, mask)

    def _make_bounded(self, tokens: Tokens) -> BoundedKeys | WindowedKeys:
        assert self.keep is not None
        batch, groups, _, dim = tokens.k.shape
        return kept_keys(
            self.keep,
            self.window,
            batch=batch,
            groups=groups,
            dim=dim,
            threshold=self.threshold,
            dtype=tokens.k.dtype,
            device=tokens.k.device,
        )

    def _commit(self) -> None:
        """Move the recent tokens into the bounded keys, if there are any or they are needed."""
        if self._recent is None or self.keep is None:
            return
        if self._kept is None:
            if len(self._recent) <= self.keep:
                return
            self._kept = self._make_bounded(self._recent)
        _extend(self._kept, self._recent)
        self._recent = None

    def _check(
        self,
        k: Tensor,
        v: Tensor,
        score: Tensor,
        present: Tensor | None,
    ) -> None:
        if k.dim() != 4 or v.shape != k.shape or score.shape != k.shape[:3] or k.shape[2] < 1:
            raise ValueError(
                "k and v must be [B, G, Q, D] and score [B, G, Q] with Q >= 1, got "
                f"{list(k.shape)}, {list(v.shape)} and {list(score.shape)}"
            )
        if present is not None:
            check_present(present, k.shape[::2])
        if self.is_initialized and (_shape_of(k) != self._shape or k.device != self.device):
            raise ValueError(
                f"this cache holds keys of (B, G, D, dtype) = {self._shape} on {self.device}, got "
                f"{_shape_of(k)} on {k.device}: make a new LifetimeCache for another model or "
                "batch size, or empty this one with reset()"
            )

    def _check_rule(self, keep: int | None, threshold: float | None, window: int) -> None:
        given = {"keep": keep, "threshold": threshold, "window": window}
        begun = {name: getattr(self, name) for name in given}
        if self._used and given != begun:
            now, then = (
                ", ".join(f"{name}={value}" for name, value in rule.items())
                for rule in (given, begun)
            )
            raise ValueError(
                f"{now} differ from {then}, with which this cache was filled: give the same in "
                "every call, or empty it with reset()"
            )
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep} must be at least 1, or None for all keys")
        if window < 0 or (keep is not None and window > keep):
            raise ValueError(f"window={window} must be from 0 to keep={keep}")

    def get_seq_length(self) -> int:
        """Return the tokens seen, padding and evicted ones included."""
        return self._seen

    def tell_length(self, count: int) -> None:
        """Say how many tokens were seen, where `update` got only the best of them."""
        self._seen = count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return ``(tokens seen and new, 0)``, the width of an attention mask and where it begins.

        A mask speaks of tokens and not of slots: which slots a row sees is what `update` returns.
        """
        return self._seen + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: any number of tokens can be taken in."""
        return -1

    def activate_past_recording(self) -> None:
        """Hold new tokens until the next `crop`, so that it can remove them.

        Until then memory grows with them. Setting ``record_past`` to False, or `reset`, ends it.
        """
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, as if they had never been there.

        Exact as long as nothing was evicted, and for the tokens since past recording was activated
        or since the last `crop` after that.

        Args:
            tokens_to_remove: Minus their number; 0 only ends what recording holds.

        Raises:
            ValueError: If positive, if so many were not seen, or if an eviction since cannot be
                undone. Nothing is changed then.
        """
        count = self.check_crop(tokens_to_remove)
        self._seen -= count
        if self._recent is not None:
            left = len(self._recent) - count
            self._recent = self._recent.first(left) if left else None
        self._commit()

    def check_crop(self, tokens_to_remove: int) -> int:
        """Return how many tokens `crop` would remove, or raise as it would; changes nothing."""
        count = -tokens_to_remove
        if count < 0:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove} must not be positive: pass "
                "length - cache.get_seq_length() to keep the first length tokens"
            )
        if count > self._seen:
            raise ValueError(f"cannot remove {count} tokens of {self._seen}")
        held = 0 if self._recent is None else len(self._recent)
        if count > held:
            raise ValueError(
                f"cannot remove the last {count} tokens: keys were evicted to keep {self.keep} "
                f"and only the last {held} tokens can be taken back; call "
                "cache.activate_past_recording() before the tokens that may be removed"
            )
        return count

    def reset(self) -> None:
        """Forget everything, batch size and ``keep`` included, and stop past recording."""
        self.record_past = False
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take batch row ``beam_idx[b]`` for row ``b``."""
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row ``repeats`` times."""
        if self.is_initialized:
            rows = torch.arange(self._shape[0], device=self.device)
            self._select_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows at ``indices``, integers or bool ``[B]``."""
        if self.is_initialized:
            rows = torch.arange(self._shape[0], device=indices.device)
            self._select_rows(rows[indices])

    def _select_rows(self, index: Tensor) -> None:
        if not self.is_initialized:
            return
        self._shape = (len(index), *self._shape[1:])
        if self._kept is not None:
            self._kept.select_rows(index)
        if self._recent is not None:
            self._recent = self._recent.each(lambda t: t.index_select(0, index.to(t.device)))

    def offload(self) -> None:
        """Move the tensors to the CPU."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Move the tensors back."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        if self._kept is not None:
            self._kept.to(device)
        if self._recent is not None:
            # As in `BoundedKeys.to`: what is on the CPU has arrived there.
            there = torch.device(device).type != "cpu"
            self._recent = self._recent.each(lambda t: t.to(device, non_blocking=there))

    def memory(self) -> int:
        """Return the bytes of all tensors held."""
        parts = (self._kept, self._recent)
        return sum(part.memory() for part in parts if part is not None)


def _attended(k: Tensor, v: Tensor, score: Tensor, mask: Lifetimes) -> Attended:
    return (k, v), (score, mask)


def _extend(
    kept: BoundedKeys | WindowedKeys, tokens: Tokens, *, commit: bool = True
) -> tuple[Tensor, Tensor, Tensor, Lifetimes]:
    return kept.extend(tokens.k, tokens.v, tokens.score, present=tokens.present, commit=commit)


def _shape_of(k: Tensor) -> tuple[int, int, int, torch.dtype]:
    return k.shape[0], k.shape[1], k.shape[3], k.dtype


def without_score() -> ValueError:
    """Return the error of an `update` as other models call it."""
    return ValueError(
        "LifetimeCache keeps keys by their score, which update() does not know: call "
        "cache.extend(k, v, score, layer_idx, keep=...), as DMA layers do; for other models use "
        "transformers' DynamicCache"
    )
