# mypy: disable-error-code="no-untyped-def"
"""Which keys live in each span of query slots, ordered so that neighbours live alike."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# Query slots of a span. Longer spans mean fewer partial sums per key, shorter ones more even work.
SPAN = 4096
_BLOCK = 2048


class SpanLists(NamedTuple):
    """Keys that live in each span of `SPAN` query slots.

    Attributes:
        keys: ``[B, G, U, C]`` int32 key slots: first those that live at its first query row,
            by expiry, then those born in it, by birth. A block of neighbours so shares most of the
            rows that see it.
        counts: ``[B, G, U]`` int32.
    """

    keys: Tensor
    counts: Tensor


def span_lists(expiry: Tensor, *, q_len: int, most: int) -> SpanLists:
    """List the keys of every span ``[SPAN * u, SPAN * (u + 1))`` that holds query rows.

    Args:
        expiry: ``[B, G, K]`` int32, see `dynmask.masks.Lifetimes`; contiguous along K.
        q_len: Query rows, the last slots.
        most: At least the number of keys that any row sees.
    """
    batch, groups, k_len = expiry.shape
    u0 = (k_len - q_len) // SPAN
    spans = triton.cdiv(k_len, SPAN) - u0
    width = min(most + SPAN, k_len)
    order = expiry.argsort(dim=-1, stable=True)
    keys = expiry.new_empty(batch, groups, spans, width)
    counts = expiry.new_empty(batch, groups, spans)
    if keys.numel() > 0:
        _span_kernel[(spans, batch * groups)](
            expiry,
            order,
            keys,
            counts,
            groups,
            *expiry.stride()[:2],
            k_len,
            k_len - q_len,
            u0,
            spans,
            width,
            SPAN=SPAN,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return SpanLists(keys, counts)


@triton.jit(do_not_specialize=["G", "K", "first_row", "u0", "spans", "width"])
def _span_kernel(
    p_expiry,
    p_order,
    p_keys,
    p_count,
    G,
    s_b,
    s_g,
    K,
    first_row,
    u0,
    spans,
    width,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_u = tl.program_id(0)
    i_bg = tl.program_id(1).to(tl.int64)
    p_expiry += (i_bg // G) * s_b + (i_bg % G) * s_g
    p_order += i_bg * K
    p_keys += (i_bg * spans + i_u) * width
    a = (u0 + i_u) * SPAN
    b = tl.minimum(a + SPAN, K)
    first = tl.maximum(a, first_row)
    n = 0
    for start in range(0, tl.where(a > 0, K, 0), BLOCK):
        o = start + tl.arange(0, BLOCK)
        o_j = tl.load(p_order + o, mask=o < K, other=0).to(tl.int32)
        b_e = tl.load(p_expiry + o_j, mask=o < K, other=0)
        lives = (o_j < a) & (b_e > first)
        place = n + tl.cumsum(lives.to(tl.int32), 0)
        tl.store(p_keys + place - 1, o_j, mask=lives & (place <= width))
        n = tl.max(place, 0)
    for start in range(a, b, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        b_e = tl.load(p_expiry + o_j, mask=o_j < b, other=0)
        lives = (b_e > o_j) & (b_e > first)
        place = n + tl.cumsum(lives.to(tl.int32), 0)
        tl.store(p_keys + place - 1, o_j, mask=lives & (place <= width))
        n = tl.max(place, 0)
    tl.store(p_count + i_bg * spans + i_u, n)
