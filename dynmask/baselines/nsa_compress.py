"""Compressed blocks of keys or values, and how much attention they get."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynmask.dam.kernels import MOST_DIM, on_gpu

# Probabilities alive at once while importance is computed.
_CELLS = 1 << 27


class BlockCompression(nn.Module):
    """Blocks of ``l`` vectors made one: an MLP over the block and learned places in it.

    Block ``c`` holds the tokens ``(c + 1) d - l`` to ``(c + 1) d - 1``, those before the first one
    being zeros. A learned vector stands in front of all blocks.

    Args:
        groups: ``G``, kv heads; they share the MLP.
        dim: Width of a head.
        block: ``l``, tokens of a block.
        stride: ``d``, tokens between two blocks.
        hidden: Hidden width of the MLP.
    """

    def __init__(self, groups: int, dim: int, *, block: int, stride: int, hidden: int):
        super().__init__()
        self.block = block
        self.stride = stride
        self.memory = nn.Parameter(torch.zeros(groups, 1, dim))
        self.places = nn.Parameter(torch.zeros(groups, block, dim))
        self.up = nn.Linear(block * dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Compress.

        Args:
            x: ``[B, G, N, dim]``.

        Returns:
            ``[B, G, 1 + N // d, dim]``, the learned vector first.
        """
        count = x.shape[2] // self.stride
        if count:
            before = self.block - self.stride
            whole = functional.pad(x[:, :, : count * self.stride], (0, 0, before, 0))
            blocks = whole.unfold(2, self.block, self.stride).mT
        else:  # The MLP runs all the same: a parameter without a gradient stops DDP.
            blocks = x[:, :, :0, None].expand(-1, -1, -1, self.block, -1)
        blocks = (blocks + self.places[:, None]).flatten(3)
        made = self.down(self.up(blocks).relu())
        return torch.cat([self.memory.to(made.dtype).expand(len(x), -1, -1, -1), made], 2)


def visible(
    q_len: int, k_len: int, *, stride: int, device: torch.device, first: int | None = None
) -> Tensor:
    """Return ``[Q, 1 + K // d]`` bool: the learned vector, and blocks that end before the row.

    Args:
        q_len: Rows ``Q``.
        k_len: Tokens ``K``.
        stride: ``d``.
        device: Where the tensor lives.
        first: The token of the first row; None: the rows are the last ones.
    """
    first = k_len - q_len if first is None else first
    row = torch.arange(first, first + q_len, device=device)
    return torch.arange(1 + k_len // stride, device=device) * stride <= row[:, None]


def importance(
    q: Tensor, keys: Tensor, k_len: int, *, block: int, stride: int, select_block: int
) -> Tensor:
    r"""Return how much attention goes to what overlaps each block that can be selected.

    ``p_j = \sum_h \sum_{c in j} \sum_m a_{h,m}`` over the strides ``c`` of block ``j`` and the
    compressed blocks ``m`` that hold ``c``; ``a`` is the softmax of the compressed branch, and
    ``h`` are the query heads of a kv head. In float32; on a GPU in kernels that write no ``a``.

    Args:
        q: ``[B, H, Q, d]``, the last rows.
        keys: ``[B, G, 1 + C, d]`` of `BlockCompression`.
        k_len: Tokens ``K``.
        block: Tokens of a compressed block.
        stride: Tokens between two of them.
        select_block: Tokens of a block that can be selected.

    Returns:
        ``[B, G, Q, blocks]``.

    Source: equations 9 and 10 of arXiv 2502.11089.
    """
    batch, heads, q_len, dim = q.shape
    if on_gpu(q) and q.dtype == keys.dtype and dim <= MOST_DIM:
        from dynmask.baselines.triton.importance import block_importance

        return block_importance(q, keys, k_len, block, stride, select_block)
    rows = max(1, _CELLS // (batch * heads * keys.shape[2]))
    strides = -(-k_len // select_block) * (select_block // stride)
    overlap = block // stride
    parts = []
    for top in range(0, q_len, rows):
        some = q[:, :, top : top + rows].unflatten(1, (keys.shape[1], -1))
        first = k_len - q_len + top
        seen = visible(some.shape[3], k_len, stride=stride, device=q.device, first=first)
        logits = (some @ keys.mT[:, :, None]).float() * dim**-0.5
        attended = logits.masked_fill(~seen, -torch.inf).softmax(-1)[..., 1:].sum(2)
        # Blocks m = c to c + overlap - 1 hold stride c.
        attended = functional.pad(attended, (0, strides + overlap - 1 - attended.shape[-1]))
        of_stride = attended[..., :strides]
        for shift in range(1, overlap):
            of_stride = of_stride + attended[..., shift : shift + strides]
        parts.append(of_stride.unflatten(-1, (-1, select_block // stride)).sum(-1))
    return torch.cat(parts, 2)
