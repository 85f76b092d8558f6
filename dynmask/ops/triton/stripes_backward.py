"""Backward pass under stripes: dq as the forward pass walks; columns, then all keys, for dk, dv."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dynmask.ops.triton import stripes_dkdv, stripes_dq
from dynmask.ops.triton.backward import softmax_terms
from dynmask.ops.triton.common import dot_precision, int32_offsets, padded_dim, processors
from dynmask.ops.triton.stripes_tables import StripeKeys, TileTables, corner_parts

# Elements of dk in sums of columns; 2^26 float32 are 256 MiB, and dv as many.
_PART_ELEMENTS = 1 << 26
# Programs for each multiprocessor that columns are shared out to, of this many rows at least.
_WAVES = 8
_LEAST_ROWS = 1024


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    keys: StripeKeys,
    dq_tables: TileTables,
    dkdv_tables: TileTables,
    most_columns: int,
    corner: Tensor | None,
    runs: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
    *,
    first: int,
    last: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients in q, k, v (their dtypes) and bias (float32, or None without bias).

    As `dynmask.ops.triton.backward.backward`. The rows of gathered columns are cut into spans with
    sums of their own; a program that has a tile of keys then adds these head after head, span after
    span, to what offsets give: no atomics, the same bits in every run. The sums take ``8 D`` bytes
    per column and query head of the kv heads that run at once.

    Args:
        q: As in `dynmask.ops.triton.stripes_forward.forward`, and so are k, v and bias.
        k: See there.
        v: See there.
        bias: See there.
        keys: The mask's.
        dq_tables: The mask's, for `dynmask.ops.triton.stripes_dq.tiles`.
        dkdv_tables: The mask's, for `dynmask.ops.triton.stripes_dkdv.tiles`, with keys for rows and
            rows for keys: blocks of rows see the keys of a tile as rows of a tile see blocks of
            keys.
        most_columns: At least the columns of any head that is not full.
        corner: ``[H, L, L]`` bool, contiguous: what the rows before ``L`` see, or None.
        runs: ``[B, 2]`` int32, first and one past the last real key slot, or None for all.
        scale: Factor of the logits.
        out: ``[B, H, Q, D]``, the forward's result.
        lse: ``[B, H, Q]`` float32, the forward's.
        grad: ``[B, H, Q, D]``, gradient in ``out``, last stride 1.
        grad_lse: ``[B, H, Q]`` float32, gradient in ``lse``, or None.
        first: First position of any sequence that has a query row.
        last: One past the last position of any sequence.
    """
    lse, delta = softmax_terms(out, lse, grad, grad_lse)
    empty = torch.empty if runs is None else torch.zeros  # Padding is not written.
    dq = torch.empty_like(q) if runs is None else torch.zeros_like(q)
    size = 0 if corner is None else corner.shape[1]
    tile = stripes_dq.tiles(q)[0]
    given = q, k, v, bias
    for low, high, inside in corner_parts(first // tile, triton.cdiv(last, tile), tile, corner):
        stripes_dq.query_gradient(
            *given,
            keys,
            dq_tables,
            inside,
            runs,
            dq,
            scale,
            grad,
            lse,
            delta,
            first=low,
            last=high,
        )

    (batch, groups, k_len), heads, q_len, dim = k.shape[:3], q.shape[1], q.shape[2], q.shape[-1]
    ratio = heads // groups
    tile, block_m, warps, stages = stripes_dkdv.tiles(q)
    dk, dv = (empty(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
    dbias = None if bias is None else empty(k.shape[:3], dtype=torch.float32, device=k.device)
    most = min(most_columns, k_len)
    block_n = min(tile, max(16, triton.next_power_of_2(most)))
    tiles = triton.cdiv(most, block_n)
    splits = triton.cdiv(_WAVES * processors(q.device), max(1, tiles * batch * heads))
    splits = min(
        splits,
        triton.cdiv(last - first, _LEAST_ROWS),
        _PART_ELEMENTS // max(1, batch * heads * most * dim),
    )
    splits = max(1, splits)
    at_once = _PART_ELEMENTS // max(1, ratio * splits * most * dim)
    at_once = max(1, min(at_once, batch * groups))
    part_dk, part_dv = lse.new_empty(2, at_once * ratio, splits, most, dim)
    part_db = None if bias is None else lse.new_empty(at_once * ratio, splits, most)
    tensors = (*given, grad, lse, delta)
    strides = (
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *grad.stride()[:3],
        *((0, 0) if bias is None else bias.stride()[:2]),
    )
    common = {
        "R": ratio,
        "D": dim,
        "BLOCK_D": padded_dim(dim),
        "HAS_BIAS": bias is not None,
        "PADDED": runs is not None,
        "WIDE": not int32_offsets(q, grad),
        "PRECISION": dot_precision(q),
        "BLOCK_M": block_m,
        "num_stages": stages,
    }
    for first_bg in range(0, batch * groups, at_once):
        here = min(at_once, batch * groups - first_bg)
        if most > 0:
            stripes_dkdv.columns_kernel[tiles, splits, here * ratio](
                *tensors,
                keys.columns,
                keys.column_runs,
                keys.offset_runs,
                runs,
                part_dk,
                part_dv,
                part_db,
                *strides,
                scale,
                groups,
                q_len,
                k_len,
                size,
                first_bg,
                first,
                triton.cdiv(last - first, splits),
                most,
                **common,
                BLOCK_N=block_n,
                num_warps=warps if block_n == tile else 4,
            )
        for low, high, inside in corner_parts(0, triton.cdiv(last, tile), tile, corner):
            stripes_dkdv.keys_kernel[high - low, here](
                *tensors,
                keys.is_column,
                keys.offset_runs,
                *dkdv_tables,
                inside,
                runs,
                part_dk,
                part_dv,
                part_db,
                dk,
                dv,
                dbias,
                *strides,
                scale,
                groups,
                q_len,
                k_len,
                keys.is_column.shape[1],
                size,
                first_bg,
                low,
                splits,
                most,
                **common,
                HAS_CORNER=inside is not None,
                HAS_COLUMNS=most > 0,
                TILE=tile,
                num_warps=warps,
            )
    return dq, dk, dv, dbias
