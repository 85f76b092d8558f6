"""The GPU backend: exact attention under `Lifetimes` by Triton kernels.

Prefill gathers, for each tile of query rows, the keys that live in it, so its cost follows the mask
and not the length. Decode reads the visible keys of the cache only. The backward pass needs no
atomics: it gives the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dynmask.masks import Lifetimes, Mask
from dynmask.masks.triton.schedule import is_listed
from dynmask.ops.triton import operators
from dynmask.ops.triton.decode import MOST_ROWS

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_DIM = 256


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    *,
    bias: Tensor | None,
    return_lse: bool,
) -> str | None:
    """Return None if the kernels can run the call, else the reason why not."""
    interpreted = triton.knobs.runtime.interpret
    if not isinstance(mask, Lifetimes):
        return "the triton backend runs Lifetimes masks only"
    if q.device.type != "cuda" and not (interpreted and q.device.type == "cpu"):
        return f"the triton backend needs CUDA tensors, these are on {q.device}"
    if q.dtype not in _DTYPES:
        return f"the triton backend runs float16, bfloat16 and float32, not {q.dtype}"
    if interpreted and q.dtype == torch.bfloat16:
        return "Triton's interpreter does not multiply bfloat16"
    if q.shape[-1] > _MOST_DIM:
        return f"the triton backend runs head sizes up to {_MOST_DIM}, not {q.shape[-1]}"
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Attend; few rows without gradients by the decode kernel, else by gathered tiles.

    Keys and values of a tile of 128 query slots must be finite, hidden ones too.

    Args:
        q: ``[B, H, Q, D]``.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
        mask: Lifetimes.
        bias: ``[B, G, K]`` or None.
        scale: Factor of the logits.
        return_lse: Ignored: the log-sum-exp comes for free.

    Returns:
        ``[B, H, Q, D]`` in q's dtype and ``[B, H, Q]`` float32.
    """
    assert isinstance(mask, Lifetimes)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    bias = None if bias is None else bias.float().contiguous()
    expiry = _rows(mask.expiry).expand(k.shape[:3])
    inputs = [t for t in (q, k, v, bias) if t is not None]
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if q.shape[1] // k.shape[1] * q.shape[2] <= MOST_ROWS and not grad:
        return operators.attend_decode(q, k, v, bias, expiry, scale)
    lists, most = prepare(mask, q.shape[2], k.shape[2])
    if mask.expiry.shape[:2] != k.shape[:2]:
        lists = [_expand(t, k.shape[:2]) for t in lists]
    return operators.attend(q, k, v, bias, expiry, lists, most, scale)


def prepare(mask: Lifetimes, q_len: int, k_len: int) -> tuple[list[Tensor], int]:
    """Make the key lists of a mask for ``q_len`` rows over ``k_len`` keys, and keep them with it.

    Prefill calls this by itself; it is public to be timed. It waits for the device only if
    ``mask.most`` is not known.

    Returns:
        The lists as operators take them (none where they would not pay), and the most keys that a
        row sees.
    """
    made = mask.__dict__.setdefault("_triton_lists", {})
    tracing = torch.compiler.is_compiling()
    if not tracing and (q_len, k_len) in made:
        lists, most = made[q_len, k_len]
        return lists, most
    most = _most_alive(mask.expiry) if mask.most is None else min(mask.most, k_len)
    lists = []
    if is_listed(k_len, most):
        lists = operators.schedule(_rows(mask.expiry), q_len, most)
    if not tracing:
        made[q_len, k_len] = lists, most
    return lists, most


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
