"""Attention under `Lifetimes`: which kernels run, and the lists that they need."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmask.masks import Lifetimes
from dynmask.masks.triton.schedule import TILE, is_listed, list_shape
from dynmask.ops.arguments import wants_gradients
from dynmask.ops.triton import operators
from dynmask.ops.triton.decode import MOST_ROWS

# Lists of more than this are made and used for a part of the rows at a time.
_LIST_BYTES = 1 << 30


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Lifetimes, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend; few rows without gradients by the decode kernel, else by gathered tiles.

    Args:
        q: ``[B, H, Q, D]``.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
        mask: See `dynmask.masks.Lifetimes`.
        bias: ``[B, G, K]`` or None.
        scale: Factor of the logits.

    Returns:
        ``[B, H, Q, D]`` in q's dtype and ``[B, H, Q]`` float32.
    """
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    bias = None if bias is None else bias.float().contiguous()
    grad = wants_gradients(q, k, v, bias)
    q_len, k_len = q.shape[2], k.shape[2]
    if q.shape[1] // k.shape[1] * q_len <= MOST_ROWS and not grad:
        expiry = mask.expiry if mask.is_causal else _rows(mask.expiry)
        return operators.attend_decode(
            q, k, v, bias, expiry.expand(k.shape[:3]), scale, mask.is_causal
        )
    rows = _rows_at_once(mask, q_len, k_len)
    if rows >= q_len:
        return _attend_rows(q, k, v, mask, bias, scale)
    parts = []
    for first in range(0, q_len, rows):
        last = min(first + rows, q_len)
        seen = k_len - q_len + last
        parts.append(
            _attend_rows(
                q[:, :, first:last],
                k[:, :, :seen],
                v[:, :, :seen],
                mask.prefix(seen),
                None if bias is None else bias[:, :, :seen],
                scale,
            )
        )
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def prepare(mask: Lifetimes, q_len: int, k_len: int) -> tuple[list[Tensor], int]:
    """Make the key lists of a mask for ``q_len`` rows over ``k_len`` keys, and keep them with it.

    Prefill calls this by itself; it is public to be timed. It waits for the device only if
    ``mask.most`` is not known.

    Returns:
        The lists as operators take them (none where they would not pay), and the most keys that a
        row sees.
    """
    if torch.compiler.is_compiling():
        return _lists(mask, q_len, k_len)
    made = mask.__dict__.setdefault("_triton_lists", {})
    if (q_len, k_len) not in made:
        made[q_len, k_len] = _lists(mask, q_len, k_len)
    lists, most = made[q_len, k_len]
    return lists, most


def _lists(mask: Lifetimes, q_len: int, k_len: int) -> tuple[list[Tensor], int]:
    most = _most(mask)
    if not is_listed(k_len, most):
        return [], most
    return operators.schedule(_rows(mask.expiry), q_len, most), most


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, mask: Lifetimes, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    lists, most = prepare(mask, q.shape[2], k.shape[2])
    if mask.expiry.shape[:2] != k.shape[:2]:
        lists = [_expand(t, k.shape[:2]) for t in lists]
    expiry = _rows(mask.expiry).expand(k.shape[:3])
    return operators.attend(q, k, v, bias, expiry, lists, most, scale, mask.is_causal)


def _rows_at_once(mask: Lifetimes, q_len: int, k_len: int) -> int:
    """Return how many query rows' lists fit the bound; all rows where none are made."""
    most = _most(mask)
    if not is_listed(k_len, most):
        return q_len
    tiles, width = list_shape(k_len, q_len, most)
    batch, groups = mask.expiry.shape[:2]
    fit = _LIST_BYTES // (4 * batch * groups * width)
    return q_len if tiles <= fit else max(1, fit) * TILE


def _most(mask: Lifetimes) -> int:
    """Return the most keys that a row sees, counted once if it is not known."""
    k_len = mask.expiry.shape[-1]
    if mask.most is not None:
        return min(mask.most, k_len)
    if torch.compiler.is_compiling():
        return k_len
    if "_most" not in mask.__dict__:
        mask.__dict__["_most"] = _most_alive(mask.expiry)
    most: int = mask.__dict__["_most"]
    return most


def _rows(expiry: Tensor) -> Tensor:
    """Return the same with neighbours along K side by side, as the kernels read them."""
    return expiry if expiry.stride(-1) == 1 else expiry.contiguous()


def _expand(lists: Tensor, batch_groups: torch.Size) -> Tensor:
    wide = lists.expand(*batch_groups, *lists.shape[2:])
    return wide if lists.dim() == 4 else wide.contiguous()


def _most_alive(expiry: Tensor) -> int:
    """Return the most keys that any row sees: births up to a row less deaths up to it."""
    k_len = expiry.shape[-1]
    if k_len == 0:
        return 0
    slot = torch.arange(k_len, device=expiry.device)
    lives = expiry > slot
    change = torch.nn.functional.pad(lives.int(), (0, 1))
    end = expiry.clamp_max(k_len).long().where(lives, k_len)
    change.scatter_add_(-1, end, -lives.int())
    return int(change[..., :k_len].cumsum(-1).max())
