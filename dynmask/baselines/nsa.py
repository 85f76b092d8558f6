"""Native sparse attention: compressed blocks, blocks chosen by them, and a window, with gates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynmask.baselines.best import best
from dynmask.baselines.nsa_compress import BlockCompression, importance, visible
from dynmask.baselines.trainable import Angles, TrainableAttention, rotate, row_blocks
from dynmask.masks import Blocks, Lifetimes
from dynmask.ops import attention


@dataclass(frozen=True)
class NsaBlocks:
    """Lengths of native sparse attention, in tokens or blocks.

    Attributes:
        compress_block: ``l``, tokens of a compressed block; a multiple of the stride.
        compress_stride: ``d``, tokens between two compressed blocks.
        select_block: ``l'``, tokens of a block that is selected whole; a multiple of the stride.
        select_count: ``n``, selected blocks of a row, the forced ones included.
        select_initial: Blocks at the start that are always selected.
        select_local: Nearest blocks that are always selected, the row's own included.
        window: Nearest keys of the third branch, the own one included.

    Raises:
        ValueError: A value is out of its range.

    Source: the defaults are those of arXiv 2502.11089.
    """

    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    select_count: int = 16
    select_initial: int = 1
    select_local: int = 2
    window: int = 512

    def __post_init__(self) -> None:
        stride = self.compress_stride
        if stride < 1:
            raise ValueError(f"compress_stride={stride} must be at least 1")
        for name in ("compress_block", "select_block"):
            if (value := getattr(self, name)) < stride or value % stride:
                raise ValueError(f"{name}={value} must be a multiple of compress_stride={stride}")
        initial, local, count = self.select_initial, self.select_local, self.select_count
        if initial < 0 or local < 1:
            raise ValueError(
                f"need select_initial >= 0 and select_local >= 1 (a row's own block), got {initial}"
                f" and {local}"
            )
        if count < initial + local:
            raise ValueError(
                f"select_count={count} must be at least {initial + local}, the "
                f"select_initial={initial} and select_local={local} blocks that it includes"
            )
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")


class NativeSparseAttention(TrainableAttention):
    r"""Self-attention in three branches, mixed by gates that read the row's input.

    For a row ``i`` of query head ``h``::

        g        = sigmoid(W x_i + b)                    one number for each branch
        o_cmp    = attention to compressed blocks of keys and values that end before i
        o_sel    = attention to the keys j <= i of the n blocks of largest importance
        o_win    = attention to the nearest keys
        y        = g_cmp o_cmp + g_sel o_sel + g_win o_win

    A block's importance is the attention that the compressed branch pays to what overlaps it, added
    up over the query heads of the kv head, which share their choice. The first and the nearest
    blocks are always chosen. The choice has no gradient; all else has.

    What the paper leaves open, and where it costs little, follows native-sparse-attention-pytorch
    0.2.3, so that equal weights give equal outputs: a ReLU MLP compresses, over the block plus
    learned places; blocks end at multiples of the stride, the first ones filled up with zeros in
    front; a learned slot is always visible beside the compressed ones; that branch has no RoPE; a
    row sees a compressed block if it ends before the row's own token (the paper: not after it); and
    one set of keys and values serves all branches (the paper: one for each).

    That package differs from the paper and from this module in the choice: its importance is the
    mean of the logits over heads and over the compressed blocks that end in a block, and it forces
    none but the row's own block. Where the order is the same, ``select_count`` one larger,
    ``select_initial=0``, ``select_local=1`` and ``window`` one larger make up for it.

    Args:
        width: As in `TrainableAttention`, and so are heads, groups, dim, bias, impl and layer_idx.
        heads: See there.
        groups: See there.
        dim: See there.
        blocks: Lengths of the three branches.
        compress_hidden: Hidden width of the MLPs that compress; ``dim`` by default.
        bias: See there.
        impl: What computes the selection and window branches, as in `dynmask.attention`.
        layer_idx: See there.

    Source: arXiv 2502.11089.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        groups: int,
        dim: int,
        blocks: NsaBlocks | None = None,
        compress_hidden: int | None = None,
        bias: bool = False,
        impl: str = "auto",
        layer_idx: int = 0,
    ):
        shape = {"heads": heads, "groups": groups, "dim": dim}
        super().__init__(width, **shape, bias=bias, impl=impl, layer_idx=layer_idx)
        self.blocks = blocks = NsaBlocks() if blocks is None else blocks
        length, stride = blocks.compress_block, blocks.compress_stride
        hidden = dim if compress_hidden is None else compress_hidden
        self.k_compress = BlockCompression(groups, dim, block=length, stride=stride, hidden=hidden)
        self.v_compress = BlockCompression(groups, dim, block=length, stride=stride, hidden=hidden)
        self.gate = nn.Linear(width, 3 * heads)

    def attend(self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, angles: Angles) -> Tensor:
        """Attend within whole sequences; see `TrainableAttention.attend`."""
        gates = self.gate(hidden).sigmoid().to(v.dtype).unflatten(-1, (q.shape[1], 3, 1))
        g_cmp, g_sel, g_win = gates.transpose(1, 2).unbind(3)
        keys, values = self.k_compress(k), self.v_compress(v)
        compressed = self._compressed(q, keys, values, k.shape[2])
        mask = self.select(q, keys, k.shape[2])
        q, k = rotate(q, angles), rotate(k, angles)
        selected = attention(q, k, v, mask, impl=self.impl)
        near = Lifetimes.window(k.shape[2], window=self.blocks.window, device=k.device)
        nearest = attention(q, k, v, near, impl=self.impl)
        return g_cmp * compressed + g_sel * selected + g_win * nearest

    def _compressed(self, q: Tensor, keys: Tensor, values: Tensor, k_len: int) -> Tensor:
        repeats = q.shape[1] // keys.shape[1]
        # Repeated, since torch's memory-efficient kernels take no groups; they are few.
        keys, values = (t.repeat_interleave(repeats, 1) for t in (keys, values))
        seen = visible(q.shape[2], k_len, stride=self.blocks.compress_stride, device=q.device)
        return functional.scaled_dot_product_attention(q, keys, values, attn_mask=seen)

    @torch.no_grad()
    def select(self, q: Tensor, keys: Tensor, k_len: int) -> Blocks:
        """Choose the blocks of each row.

        Args:
            q: ``[B, H, Q, d]`` before RoPE, the last rows.
            keys: ``[B, G, 1 + C, d]`` of `BlockCompression`.
            k_len: Tokens ``K``.

        Returns:
            A mask of ``G`` heads.
        """
        rule, q_len = self.blocks, q.shape[2]
        score = importance(
            q,
            keys,
            k_len,
            block=rule.compress_block,
            stride=rule.compress_stride,
            select_block=rule.select_block,
        )
        own = torch.arange(k_len - q_len, k_len, device=q.device)[:, None] // rule.select_block
        place = torch.arange(score.shape[-1], device=q.device)
        forced = (place < rule.select_initial) | (place > own - rule.select_local)
        score = score.masked_fill(forced, torch.inf).masked_fill(place > own, -torch.inf)
        indices = best(score, min(rule.select_count, score.shape[-1]))
        counts = (own[:, 0] + 1).clamp_max(indices.shape[-1]).expand(indices.shape[:3])
        return row_blocks(indices, counts, block=rule.select_block, k_len=k_len)
