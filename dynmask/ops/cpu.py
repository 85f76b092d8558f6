"""Sparse attention for CPU tensors: only the mask's own stripes are computed.

Per head the visible keys are the columns before the chunk's end (one matrix product with keys that
are gathered once), bands of near offsets (batched products over windows that are views of the
keys), and lone offsets (row-wise products over whole slices). All logits of a chunk of rows lie in
one buffer, so there is one softmax over them. Full heads run torch's causal kernel, a few rows of
decode gather their keys (`dynmask.ops.gather`). Lifetimes are tiled in
`dynmask.ops.lifetimes_cpu`.

The work is many small parallel calls: with more torch threads than free cores they wait for each
other and the backend loses its lead. Use ``torch.set_num_threads`` (or ``OMP_NUM_THREADS``) of at
most the free cores, or start Python with ``OMP_WAIT_POLICY=PASSIVE`` on a shared machine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynmask.masks import Lifetimes, Mask, Stripes
from dynmask.masks.schedule import Sequence, head_schedule, sequences
from dynmask.ops import gather, lifetimes_cpu, lifetimes_cpu_grad, reference, sdpa
from dynmask.ops.arguments import wants_gradients
from dynmask.ops.stripes_head import Keys, attend_head

# The schedule must promise this much less than a dense kernel before `auto` takes it: its many
# small calls cost time that pairs do not show. Measured by benchmarks/stripes_cpu.py.
_MARGIN = 0.8
# A dense kernel's pair under a mask that is not just causal: it cannot skip the future, and reads
# the mask.
_MASKED_PAIR = 2.0
# What a head costs in calls, in dense pairs.
_HEAD_PAIRS = 200_000


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    *,
    bias: Tensor | None,
    return_lse: bool,
) -> str | None:
    """Return None if this backend can run the call, else the reason why not."""
    if q.device.type != "cpu":
        return f"the cpu backend needs CPU tensors, these are on {q.device}"
    if mask is None:
        return 'without a mask there is nothing to skip; impl="sdpa" runs plain causal attention'
    if not isinstance(mask, (Stripes, Lifetimes)):
        return f"the cpu backend has no schedule for {type(mask).__name__}"
    if wants_gradients(q, k, v, bias):
        if isinstance(mask, Stripes):
            return "the cpu backend has no backward pass; wrap the call in torch.no_grad()"
        if lifetimes_cpu.is_decode(q.shape[2]):
            return "the cpu backend has no backward pass for few rows: use torch.no_grad()"
    if torch.compiler.is_compiling():
        return "the cpu backend plans in Python, which torch.compile does not trace"
    return None


def pays(q: Tensor, k: Tensor, mask: Mask) -> bool:
    """Tell whether the mask's schedule beats a dense kernel by the cost model.

    A deterministic rule: decode pays when the gathered keys are few beside the cache; prefill pays
    when the schedule's cost plus a constant per head stays under 0.8 of what a dense kernel's
    causal pairs cost, under the mask where it needs one.
    """
    q_len, k_len = q.shape[2], k.shape[2]
    if isinstance(mask, Lifetimes):
        pair = 1.0 if lifetimes_cpu.is_decode(q_len) else _MARGIN * _MASKED_PAIR
        causal = pair * q.shape[0] * q.shape[1] * _causal_pairs(k_len - q_len, k_len)
        return lifetimes_cpu.cost(q, k, mask) < causal
    assert isinstance(mask, Stripes), "supports() comes first"
    if gather.fits(mask, q_len, k_len):
        return gather.pays(q, k, mask)
    parts = sequences(mask, q_len, k_len)
    plain = mask.all_full and mask.padding is None and q_len == k_len
    pair = 1.0 if plain else _MASKED_PAIR
    dense = pair * mask.heads * len(parts) * _causal_pairs(k_len - q_len, k_len)
    return sum(_cost(mask, part) for part in parts) < _MARGIN * dense


def _cost(mask: Stripes, part: Sequence) -> float:
    """Return the cost of one sequence in dense pairs."""
    edge = _corner_rows(mask, part)
    cost: float = int(mask.full_heads.sum()) * _causal_pairs(part.first, part.length)
    cost += mask.heads * _causal_pairs(part.first, edge) * _MASKED_PAIR
    for head in _striped_heads(mask):
        cost += _HEAD_PAIRS + head_schedule(mask, head).cost(edge, part.length)
    return cost


def computed_pairs(
    mask: Stripes | Lifetimes, q_len: int, k_len: int | None = None, *, ratio: int = 1
) -> Tensor:
    """Count the (query, key) pairs that this backend evaluates, masked ones included.

    The gap to `Stripes.visible_pairs` is the waste of its tiles. Full heads count their causal
    pairs, decode the keys gathered.

    Args:
        mask: What each head sees.
        q_len: Query rows ``Q``, the last ones of the sequence.
        k_len: Key slots ``K``; ``q_len`` by default, for `Lifetimes` their own.
        ratio: Query heads of a kv head, on which the tiles of `Lifetimes` depend.

    Returns:
        ``[B, H]`` int64, ``B`` = 1 without padding. For `Lifetimes` ``[B, G]`` as they have it,
        pairs of one query head of the group.
    """
    if isinstance(mask, Lifetimes):
        return lifetimes_cpu.computed_pairs(mask, q_len, ratio)
    k_len = q_len if k_len is None else k_len
    if gather.fits(mask, q_len, k_len):
        return gather.computed_pairs(mask, q_len, k_len)
    parts = sequences(mask, q_len, k_len)
    pairs = torch.zeros(len(parts), mask.heads, dtype=torch.int64)
    full = mask.full_heads.cpu()
    for b, part in enumerate(parts):
        edge = _corner_rows(mask, part)
        pairs[b] = (edge - part.first) * edge
        for head in _striped_heads(mask):
            pairs[b, head] += head_schedule(mask, head).computed_pairs(edge, part.length)
        pairs[b, full] = _causal_pairs(part.first, part.length)
    return pairs


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Stripes | Lifetimes | None,
    bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend sequence by sequence and head by head, padding cut away.

    Args:
        q: ``[B, H, Q, D]``.
        k: ``[B, G, K, D]``.
        v: ``[B, G, K, D]``.
        mask: What each head sees.
        bias: ``[B, G, K]`` or None.
        scale: Factor of the logits.
        return_lse: Whether to compute the log-sum-exp.

    Returns:
        ``[B, H, Q, D]`` in q's dtype and ``[B, H, Q]`` or None.
    """
    assert mask is not None
    q_len, k_len = q.shape[2], k.shape[2]
    if isinstance(mask, Lifetimes):
        return _under_lifetimes(q, k, v, mask, bias, scale, return_lse)
    # What a caller would otherwise pay: views and in-place writes recorded for autograd.
    with torch.no_grad():
        if gather.fits(mask, q_len, k_len):
            return gather.attend(q, k, v, mask, bias, scale, return_lse)
        out = torch.zeros(q.shape, dtype=q.dtype)
        lse = None
        if return_lse:
            lse = torch.full(q.shape[:3], -torch.inf, dtype=reference.accumulation_dtype(q.dtype))
        parts = sequences(mask, q_len, k_len)
        for b in range(q.shape[0]):
            part = parts[b] if mask.padding is not None else parts[0]
            if part.first == part.length:
                continue
            rows = slice(
                part.start + part.first - k_len + q_len, part.start + part.length - k_len + q_len
            )
            keys = slice(part.start, part.start + part.length)
            _sequence(
                q[b, :, rows],
                k[b, :, keys],
                v[b, :, keys],
                mask,
                None if bias is None else bias[b, :, keys],
                scale,
                out[b, :, rows],
                None if lse is None else lse[b, :, rows],
            )
    return out, lse


def _under_lifetimes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Lifetimes,
    bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    args = (q, k, v, mask, bias, scale, return_lse)
    gradients = wants_gradients(q, k, v, bias)
    with torch.no_grad():
        if lifetimes_cpu.is_decode(q.shape[2]):
            return lifetimes_cpu.attend_rows(*args)
        # A hidden key's bias may be -inf, which hides it twice, but not NaN.
        finite = _finite(k) and _finite(v) and (bias is None or not bool(bias.isnan().any()))
        if not gradients:
            return lifetimes_cpu.attend_tiles(*args, finite=finite)
    if not finite:  # Rare, and a sign of trouble already: slow is good enough.
        return reference.attend(*args)
    out, lse = lifetimes_cpu_grad.TiledAttention.apply(q, k, v, bias, mask, scale)
    return out, lse if return_lse else None


def _sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Stripes,
    bias: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Fill ``out [H, Q, D]`` and ``lse [H, Q]`` for one sequence, ``k`` and ``v [G, K, D]``."""
    length = k.shape[1]
    if not (_finite(k) and _finite(v)):
        # A tile adds -inf to hidden logits and 0 times hidden values to sums, which hides finite
        # numbers only. Rare, and a sign of trouble already: slow is good enough.
        under = mask.unpadded
        args = (None if bias is None else bias[None], scale, True)
        part_out, part_lse = reference.attend(q[None], k[None], v[None], under, *args)
        out.copy_(part_out[0])
        if lse is not None:
            lse.copy_(part_lse[0])
        return
    part = Sequence(0, length - q.shape[1], length)
    edge = _corner_rows(mask, part)
    ratio = q.shape[0] // k.shape[0]

    def dense(heads: Tensor | slice, rows: slice, last: int, under: Stripes | None) -> None:
        groups: Tensor | slice = slice(None)
        if isinstance(heads, Tensor):
            groups = heads // ratio
        run = sdpa if lse is None else reference
        part_out, part_lse = run.attend(
            q[None, heads, rows],
            k[None, groups, :last],
            v[None, groups, :last],
            under,
            None if bias is None else bias[None, groups, :last],
            scale,
            lse is not None,
        )
        out[heads, rows] = part_out[0]
        if lse is not None and part_lse is not None:
            lse[heads, rows] = part_lse[0]

    if edge > part.first:
        dense(slice(None), slice(0, edge - part.first), edge, mask.unpadded)
    if mask.all_full:
        dense(slice(None), slice(None), length, None)
    elif bool(mask.full_heads.any()):
        dense(mask.full_heads.nonzero().flatten(), slice(None), length, None)
    if edge == length:
        return
    striped = _striped_heads(mask)
    for group in range(k.shape[0]):
        heads = [h for h in striped if h // ratio == group]
        if not heads:
            continue
        schedules = [head_schedule(mask, h) for h in heads]
        keys = Keys.build(
            k[group], v[group], None if bias is None else bias[group], schedules, edge
        )
        for head, schedule in zip(heads, schedules, strict=True):
            attend_head(
                q[head, edge - part.first :],
                keys,
                schedule,
                scale,
                out[head, edge - part.first :],
                None if lse is None else lse[head, edge - part.first :],
            )


def _finite(tensor: Tensor) -> bool:
    # A sum is finite only if all are. One that overflows is a false alarm, which costs only time.
    return bool(tensor.sum(dtype=reference.accumulation_dtype(tensor.dtype)).isfinite())


def _striped_heads(mask: Stripes) -> list[int]:
    return (~mask.full_heads).nonzero().flatten().tolist()


def _corner_rows(mask: Stripes, part: Sequence) -> int:
    """Return the first row that the corner does not reach."""
    size = 0 if mask.corner is None else mask.corner.shape[1]
    return min(max(part.first, size), part.length)


def _causal_pairs(first: int, last: int) -> int:
    """Count the causal pairs of rows ``first`` to ``last - 1``."""
    return (last * (last + 1) - first * (first + 1)) // 2
