# mypy: disable-error-code="no-untyped-def"
"""Backward pass: dq over the forward's lists, then dk, dv and dbias key by key, without atomics.

Key ``j`` is seen by the run of rows ``[j, expiry_j)``. A program takes a block of keys that live
alike (`dynmask.masks.triton.spans`) and walks over their rows in one span. Several spans run at
once, each into sums of its own, which are then added span after span: the order, and so the result,
is the same in every run.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynmask.masks.triton.schedule import TILE, TileLists
from dynmask.masks.triton.spans import SPAN, SpanLists
from dynmask.ops.triton.common import (
    dkdv_tiles,
    dot_precision,
    dq_tiles,
    fit_rows,
    int32_offsets,
    on_hopper,
    padded_dim,
)
from dynmask.ops.triton.dkdv import add_kernel, dkdv_kernel
from dynmask.ops.triton.dq import dq_kernel

# Elements of dk in flight for spans that run at once; 2^26 float32 are 256 MiB, and dv as many.
_PART_ELEMENTS = 1 << 26


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    expiry: Tensor,
    lists: TileLists | None,
    spans: SpanLists,
    scale: float,
    immortal: bool,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients in q, k, v (their dtypes) and bias (float32, or None without bias).

    With ``P`` the probabilities: ``dV = P^T dO``, ``dS = P * (dO V^T - rowsum(dO * O) + dlse)``,
    ``dQ = scale dS K``, ``dK = scale dS^T Q``, ``dbias = `` the column sums of ``dS`` over rows and
    the group's heads. Hidden pairs get exactly 0.

    Args:
        q: As in `dynmask.ops.triton.forward.forward`, and so are the others up to ``lists``.
        k: See there.
        v: See there.
        bias: See there.
        expiry: See there.
        lists: See there.
        spans: Of the same expiry and Q.
        scale: Factor of the logits.
        immortal: Whether no key ever expires.
        out: ``[B, H, Q, D]``, the forward's result.
        lse: ``[B, H, Q]`` float32, the forward's.
        grad: ``[B, H, Q, D]``, gradient in ``out``, last stride 1.
        grad_lse: ``[B, H, Q]`` float32, gradient in ``lse``, or None.
    """
    batch, _, q_len, dim = q.shape
    groups, k_len = k.shape[1], k.shape[2]
    lse, delta = softmax_terms(out, lse, grad, grad_lse)
    rows = grad, lse, delta
    dq = query_gradient(q, k, v, bias, expiry, lists, scale, immortal, *rows)
    tensors, strides, common = shared_arguments(q, k, v, bias, expiry, *rows)
    sizes = (scale, groups, q_len, k_len)
    portable = {"BLOCK_D": padded_dim(dim), "PRECISION": dot_precision(q)}
    hopper = on_hopper(q)

    dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=q.device) for t in (k, v))
    dbias = torch.zeros(k.shape[:3], device=q.device)
    count, width = spans.keys.shape[2:]
    at_once = max(1, min(count, _PART_ELEMENTS // max(1, batch * groups * width * dim)))
    part_dk, part_dv = dk.new_empty(2, at_once, batch * groups, width, dim)
    part_db = dk.new_empty(at_once, batch * groups, width)
    for first in range(0, count, at_once):
        here = min(at_once, count - first)
        arguments = (
            *tensors,
            spans.keys,
            spans.counts,
            part_dk,
            part_dv,
            part_db,
            *strides,
            *spans.keys.stride()[:3],
            *sizes,
            (k_len - q_len) // SPAN,
            first,
            count,
            width,
        )
        if hopper:
            hopper_dkdv = importlib.import_module("dynmask.ops.triton.hopper_dkdv")
            programs = triton.cdiv(width, 2 * hopper_dkdv.KEYS), batch * groups, here
            tile = {"KEYS": hopper_dkdv.KEYS, "BLOCK_M": hopper_dkdv.BLOCK_M, "num_warps": 4}
            hopper_dkdv.dkdv_kernel[programs](*arguments, **common, SPAN=SPAN, **tile)
        else:
            block_m, block_n, warps, stages = dkdv_tiles(q)
            programs = triton.cdiv(width, block_n), batch * groups, here
            tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps}
            dkdv_kernel[programs](
                *arguments, **common, **portable, SPAN=SPAN, num_stages=stages, **tile
            )
        # One span after another: that fixes the order of the sums.
        for i_part in range(here):
            add_kernel[(triton.cdiv(width, 32), batch * groups)](
                spans.keys,
                spans.counts,
                part_dk,
                part_dv,
                part_db,
                dk,
                dv,
                dbias,
                *spans.keys.stride()[:3],
                groups,
                k_len,
                first + i_part,
                i_part,
                count,
                width,
                HAS_BIAS=bias is not None,
                BLOCK_N=32,
                D=dim,
                BLOCK_D=padded_dim(dim),
            )
    return dq, dk.to(k.dtype), dv.to(v.dtype), None if bias is None else dbias


def softmax_terms(
    out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what turns logits into their gradient, both ``[B, H, Q]`` float32.

    With the first, ``P = exp(logit - lse)`` is 0 in rows that see nothing; the second is
    ``delta = rowsum(dO * O) - dlse``.

    Args:
        out: See `backward`, and so for the others.
        lse: See there.
        grad: See there.
        grad_lse: See there.
    """
    batch, heads, q_len, dim = out.shape
    # A row without keys, or whose keys all have bias -inf: exp2(-inf - 0) is 0, as it should be.
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    delta = torch.empty_like(lse)
    rows = batch * heads * q_len
    _delta_kernel[(triton.cdiv(rows, 32),)](
        out,
        grad,
        grad_lse,
        delta,
        *out.stride()[:3],
        *grad.stride()[:3],
        heads,
        q_len,
        rows,
        HAS_LSE=grad_lse is not None,
        ROWS=32,
        D=dim,
        BLOCK_D=padded_dim(dim),
    )
    return lse, delta


def query_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    expiry: Tensor,
    lists: TileLists | None,
    scale: float,
    immortal: bool,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    tile: int = TILE,
) -> Tensor:
    """Return dq, from the forward's lists.

    Args:
        q: See `backward`, and so for the others up to ``grad``.
        k: See there.
        v: See there.
        bias: See there.
        expiry: See there.
        lists: See there.
        scale: See there.
        immortal: See there.
        grad: See there.
        lse: Of `softmax_terms`.
        delta: Of `softmax_terms`.
        tile: Query slots of the lists' tiles.
    """
    batch, _, q_len, dim = q.shape
    groups, k_len = k.shape[1], k.shape[2]
    tensors, strides, common = shared_arguments(q, k, v, bias, expiry, grad, lse, delta)
    dq = torch.empty_like(q)
    t0 = (k_len - q_len) // tile
    tiles = triton.cdiv(k_len, tile) - t0
    packed = tile * common["R"]
    arguments = (
        *tensors,
        # Without lists their pointers are not read, but Gluon needs tensors there.
        *((expiry, expiry, expiry) if lists is None else lists),
        dq,
        *strides,
        *dq.stride()[:3],
        *((0, 0, 0) if lists is None else lists.keys.stride()[:3]),
        scale,
        groups,
        q_len,
        k_len,
        t0,
        tiles,
    )
    walk = {"LISTED": lists is not None, "IMMORTAL": immortal, "TILE": tile}
    if on_hopper(q) and tile == TILE:
        hopper_dq = importlib.import_module("dynmask.ops.triton.hopper_dq")
        grid = tiles * triton.cdiv(packed, 2 * hopper_dq.ROWS), batch * groups
        shape = {"ROWS": hopper_dq.ROWS, "BLOCK_N": hopper_dq.BLOCK_N, "num_warps": 4}
        hopper_dq.dq_kernel[grid](*arguments, **common, **walk, **shape)
        return dq
    block_m, block_n, warps, stages = fit_rows(q, packed, dq_tiles(q))
    dq_kernel[tiles * triton.cdiv(packed, block_m), batch * groups](
        *arguments,
        **common,
        **walk,
        BLOCK_D=padded_dim(dim),
        PRECISION=dot_precision(q),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )
    return dq


def shared_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    expiry: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """Return the tensors, strides and constants that the kernels of dq and of dk, dv all take."""
    # Without a bias its pointer is not read, but Gluon needs a tensor there.
    tensors = (q, k, v, q if bias is None else bias, expiry, grad, lse, delta)
    strides = (
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *grad.stride()[:3],
        *((0, 0) if bias is None else bias.stride()[:2]),
        *expiry.stride()[:2],
    )
    constants = {
        "R": q.shape[1] // k.shape[1],
        "D": q.shape[-1],
        "HAS_BIAS": bias is not None,
        "WIDE": not int32_offsets(q, k, v, grad),
    }
    return tensors, strides, constants


@triton.jit(do_not_specialize=["H", "Q", "rows"])
def _delta_kernel(
    p_out,
    p_do,
    p_dlse,
    p_delta,
    s_ob,
    s_oh,
    s_on,
    s_db,
    s_dh,
    s_dn,
    H,
    Q,
    rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_LSE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``delta = rowsum(dO * O) - dlse``, what the softmax's gradient subtracts."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_n = o_r % Q
    i_h = o_r // Q % H
    i_b = o_r // Q // H
    o_d = tl.arange(0, BLOCK_D)
    m_r = o_r < rows
    m_rd = m_r[:, None] & (o_d < D)[None, :]
    p_o = p_out + (i_b * s_ob + i_h * s_oh + i_n * s_on)[:, None] + o_d[None, :]
    p_d = p_do + (i_b * s_db + i_h * s_dh + i_n * s_dn)[:, None] + o_d[None, :]
    b_o = tl.load(p_o, mask=m_rd, other=0.0).to(tl.float32)
    b_d = tl.load(p_d, mask=m_rd, other=0.0).to(tl.float32)
    b_delta = tl.sum(b_o * b_d, 1)
    if HAS_LSE:
        b_delta -= tl.load(p_dlse + o_r, mask=m_r, other=0.0)
    tl.store(p_delta + o_r, b_delta, mask=m_r)
