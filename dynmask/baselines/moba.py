"""Mixture of block attention: each query takes the key blocks whose mean it fits best."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmask.baselines.best import best
from dynmask.baselines.trainable import Angles, TrainableAttention, rotate, row_blocks
from dynmask.masks import Blocks
from dynmask.ops import attention


@torch.no_grad()
def moba_blocks(q: Tensor, k: Tensor, *, block: int, top: int) -> Blocks:
    r"""Choose the key blocks of every row of every query head.

    Row ``i`` sees its own block, causally, and of the blocks before it the ``top - 1`` with the
    largest ``q_i \cdot mean(k in the block)``, in float32.

    Args:
        q: ``[B, H, Q, d]``; the rows are the last ``Q`` of the ``K`` tokens.
        k: ``[B, G, K, d]``.
        block: Keys of a block.
        top: Blocks of a row, its own included; at least 1.

    Returns:
        A mask of ``H`` heads.

    Source: MoBA, arXiv 2502.13189.
    """
    q_len, k_len = q.shape[2], k.shape[2]
    whole = k_len // block
    means = k[:, :, : whole * block].float().unflatten(2, (whole, block)).mean(3)
    score = q.float().unflatten(1, (k.shape[1], -1)) @ means.mT[:, :, None]
    own = torch.arange(k_len - q_len, k_len, device=q.device) // block
    past = torch.arange(whole, device=q.device) < own[:, None]
    score = score.flatten(1, 2).masked_fill(~past, -torch.inf)
    others = best(score, min(top - 1, whole))
    indices = torch.cat([own[:, None].expand(*q.shape[:3], 1), others], -1)
    counts = (own + 1).clamp_max(indices.shape[-1]).expand(q.shape[:3])
    return row_blocks(indices, counts, block=block, k_len=k_len)


class MixtureOfBlockAttention(TrainableAttention):
    """Self-attention by `moba_blocks`, after RoPE; it has no parameters besides the projections.

    Args:
        width: As in `TrainableAttention`, and so are heads, groups, dim, bias, impl and layer_idx.
        heads: See there.
        groups: See there.
        dim: See there.
        block: Keys of a block.
        top: Blocks of a row, its own included.
        bias: See there.
        impl: See there.
        layer_idx: See there.

    Raises:
        ValueError: If ``block`` or ``top`` is under 1.

    Source: MoBA, arXiv 2502.13189. Keys and values are repeated for the query heads, each of which
    chooses by itself.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        groups: int,
        dim: int,
        block: int = 512,
        top: int = 3,
        bias: bool = False,
        impl: str = "auto",
        layer_idx: int = 0,
    ):
        if block < 1 or top < 1:
            raise ValueError(f"need block >= 1 and top >= 1, got {block} and {top}")
        shape = {"heads": heads, "groups": groups, "dim": dim}
        super().__init__(width, **shape, bias=bias, impl=impl, layer_idx=layer_idx)
        self.block = block
        self.top = top

    def attend(self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, angles: Angles) -> Tensor:
        """Attend within whole sequences; see `TrainableAttention.attend`."""
        q, k = rotate(q, angles), rotate(k, angles)
        mask = moba_blocks(q, k, block=self.block, top=self.top)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        return attention(q, k, v, mask, impl=self.impl)
