"""Attention to lists of keys that the caller has made, forward only."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from dynmask.masks.triton.schedule import TileLists
from dynmask.ops.triton.common import on_hopper
from dynmask.ops.triton.forward import forward


def attend_listed(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lists: TileLists, *, tile: int, scale: float
) -> Tensor:
    """Attend from each tile of query slots to the keys that its list names, causally.

    Args:
        q: ``[B, H, Q, D]``, the last rows.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
        bias: ``[B, G, K]`` float32, contiguous along K.
        lists: Of tiles of ``tile`` slots; listed keys must be finite.
        tile: Query slots of a tile.
        scale: Factor of the logits.

    Returns:
        ``[B, H, Q, D]`` in q's dtype.
    """
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    k_len = k.shape[2]
    expiry = torch.full((1, 1, k_len), k_len, dtype=torch.int32, device=k.device)
    expiry = expiry.expand(k.shape[:3])
    with torch.cuda.device_of(q):
        if on_hopper(q):
            run = importlib.import_module("dynmask.ops.triton.hopper").forward
            return run(q, k, v, bias, expiry, lists, scale, immortal=False, tile=tile)[0]
        return forward(q, k, v, bias, expiry, lists, scale, tile=tile)[0]
