"""Backward pass under blocks: dq over the forward's lists, dk and dv over these turned around."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dynmask.masks.triton.block_lists import list_tile
from dynmask.masks.triton.block_tiles import BlockTiles
from dynmask.masks.triton.schedule import TileLists
from dynmask.ops.triton.backward import query_gradient, shared_arguments, softmax_terms
from dynmask.ops.triton.blocks_dkdv import add_parts_kernel, blocks_dkdv_kernel
from dynmask.ops.triton.common import dot_precision, padded_dim, processors

# Elements of dk in parts; 2^26 float32 are 256 MiB, and dv as many.
_PART_ELEMENTS = 1 << 26
# Packed rows that a program has at least before a block's tiles are shared out.
_LEAST_ROWS = 512
# Programs for each multiprocessor, so that the last ones do not run alone.
_WAVES = 4


def dkdv_tiles(q: Tensor, block: int) -> tuple[int, int, int, int]:
    """Return rows, keys, warps and pipeline stages of a program of dk and dv."""
    dim = padded_dim(q.shape[-1])
    keys = max(16, triton.next_power_of_2(block))
    if q.dtype == torch.float32:
        return 32 if dim <= 64 else 16, min(keys, 32), 8, 1
    if dim > 128:
        return (32, 64, 8, 2) if keys > 32 else (32, keys, 4, 2)
    stages = 3 if dim <= 64 else 2
    return (64, 128, 8, stages) if keys > 64 else (64, keys, 4, stages)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    expiry: Tensor,
    lists: TileLists,
    turned: BlockTiles,
    block: int,
    tile: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients in q, k, v (their dtypes) and bias (float32, or None without bias).

    As `dynmask.ops.triton.backward.backward`. For dk and dv, programs share the tiles that list a
    block out if they are many (attention sinks), and their sums are added in the order of the
    tiles: no atomics, the same bits in every run.

    Args:
        q: As in `dynmask.ops.triton.forward.forward`, and so are k, v and bias.
        k: See there.
        v: See there.
        bias: See there.
        expiry: ``[B, G, K]`` int32, from when on no row sees a key.
        lists: The forward's.
        turned: The same, block by block; its ``B`` and ``G`` may be 1.
        block: Key slots of a block.
        tile: Query slots of the mask's tile.
        scale: Factor of the logits.
        out: ``[B, H, Q, D]``, the forward's result.
        lse: ``[B, H, Q]`` float32, the forward's.
        grad: ``[B, H, Q, D]``, gradient in ``out``, last stride 1.
        grad_lse: ``[B, H, Q]`` float32, gradient in ``lse``, or None.
    """
    lse, delta = softmax_terms(out, lse, grad, grad_lse)
    rows = grad, lse, delta
    dq = query_gradient(q, k, v, bias, expiry, lists, scale, False, *rows, tile=list_tile(tile))

    (batch, groups, k_len), q_len, dim = k.shape[:3], q.shape[2], q.shape[-1]
    block_m, block_n, warps, stages = dkdv_tiles(q, block)
    slices = triton.cdiv(block, block_n)
    blocks, width = turned.begin.shape[-1] - 1, turned.tiles.shape[-1]
    wanted = max(blocks, _WAVES * processors(q.device) // (batch * groups * slices))
    wanted = min(wanted, _PART_ELEMENTS // (batch * groups * block * dim))
    packed = tile * q.shape[1] // groups
    run = max(triton.cdiv(2 * width, max(1, wanted)), triton.cdiv(_LEAST_ROWS, packed), 1)
    shared = _share_out(turned.begin, run, width // run)
    # A block with parts has more than ``run`` tiles, so at most twice the parts that it fills.
    parts = 2 * (width // run)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    dbias = None if bias is None else lse.new_empty(batch, groups, k_len)
    part_dk, part_dv = lse.new_empty(2, batch * groups, parts, block, dim)
    part_db = None if bias is None else lse.new_empty(batch * groups, parts, block)
    sums = (dk, dv, dbias, part_dk, part_dv, part_db)
    # One list for all batch rows or heads is read again and again.
    some_batch, some_groups = turned.begin.shape[:2]
    list_strides = some_groups if some_batch > 1 else 0, int(some_groups > 1)
    tensors, strides, common = shared_arguments(q, k, v, bias, expiry, *rows)
    head_size = {"BLOCK_D": padded_dim(dim)}
    blocks_dkdv_kernel[slices * shared.block.shape[-1], batch * groups](
        *tensors,
        *turned,
        *shared,
        *sums,
        *strides,
        *list_strides,
        scale,
        groups,
        q_len,
        k_len,
        blocks,
        block,
        width,
        run,
        parts,
        **common,
        **head_size,
        PRECISION=dot_precision(q),
        TILE=tile,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )
    if parts > 0:
        block_n = min(32, block_n)
        add_parts_kernel[blocks * triton.cdiv(block, block_n), batch * groups](
            turned.begin,
            shared.part,
            *sums,
            *list_strides,
            groups,
            k_len,
            blocks,
            block,
            run,
            parts,
            D=dim,
            **head_size,
            HAS_BIAS=bias is not None,
            BLOCK_N=block_n,
        )
    return dq, dk, dv, dbias


class _Shares(NamedTuple):
    """Which program does what.

    Attributes:
        block: ``[B, G, P]`` int32, the key block of each program, or ``N`` for none.
        first: ``[B, G, N]`` int32, the first program of each block; it has at least one.
        part: ``[B, G, N]`` int32, where the parts of a block begin, or -1 if it has one program.
    """

    block: Tensor
    first: Tensor
    part: Tensor


def _share_out(begin: Tensor, run: int, more: int) -> _Shares:
    """Give each ``run`` tiles of a block a program.

    Args:
        begin: See `BlockTiles`.
        run: Tiles of a program at most.
        more: At least the number of programs beyond one for each block.
    """
    programs = ((begin.diff() + run - 1) // run).clamp_min(1)
    end = programs.cumsum(-1, dtype=torch.int32)
    every = torch.arange(begin.shape[-1] - 1 + more, dtype=torch.int32, device=begin.device)
    every = every.expand(*begin.shape[:2], -1).contiguous()
    block = torch.searchsorted(end, every, right=True, out_int32=True)
    several = programs > 1
    parts = programs.where(several, 0)
    part = (parts.cumsum(-1, dtype=torch.int32) - parts).where(several, -1)
    return _Shares(block, end - programs, part)
