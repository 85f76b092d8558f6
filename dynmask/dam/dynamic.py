"""Dynamic masks: which keys a prefill looks at, chosen from the attention maps of the input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dynmask.dam.dynamic_gather import attend_gathered
from dynmask.dam.dynamic_keys import Keys
from dynmask.dam.dynamic_select import Choice, select
from dynmask.dam.kernels import by_kernels
from dynmask.ops import attention
from dynmask.ops.arguments import check, wants_gradients
from dynmask.ops.attention import resolve

# Logits alive at once on a CPU, what fits its cache; elsewhere listed keys, few launches.
_CPU_CELLS = 1 << 23
_CELLS = 1 << 28


@dataclass(frozen=True)
class Dynamic:
    r"""How dynamic masks are chosen. The defaults are for every model; ``coverage`` is the quality.

    Query rows run in tiles, keys are counted in blocks. A tile sees one by one all keys since
    ``near`` tokens before it. Each older block it sees either key by key, or as one *summary*: the
    mean of its keys and the mean of its values, with the weight of ``block`` keys. What a summary
    costs is the squared distance between the softmax ``P`` of the exact logits and the weights
    ``A`` that the summary gives to its keys,

    .. math:: r_J = \operatorname{mean}_{rows, heads} \sum_{j \in J} (P_{ij} - A_{iJ})^2

    estimated from ``queries`` rows a tile and ``landmarks`` keys a block, which stand for the
    others (`dynmask.dam.landmarks`), beside the exact logits of what is near
    (`dynmask.dam.dynamic_cost.block_costs`). A tile keeps the blocks of largest ``r``, as few as
    leave ``sum of r <= (1 - coverage)^2`` to the others. So 0.985 leaves attention rows a root mean
    square distance of about 0.015 from the exact ones, as far as landmarks tell.

    Positions count from the sequence's own first token. A tile's rows choose together: which blocks
    a row sees one by one may depend on later rows of its tile (never on later tiles), and on
    whether the call ends there. Its keys and values are those up to itself, always.

    Args:
        coverage: In (0, 1]: 1 less the distance allowed; 1 keeps every block.
        tile: Query rows that share one choice.
        block: Keys of a block.
        near: Keys before the tile's first row that are always seen one by one.
        landmarks: Keys that stand for a block when blocks are chosen. On a GPU powers of two are
            quick.
        queries: Rows that stand for a tile when its blocks are chosen, of all query heads of a kv
            head together.
        few: Calls of so many rows or fewer run dense, decode included.
        shortest: Calls with fewer keys than this run dense.

    Raises:
        ValueError: A value is out of its range.

    Source: summaries of skipped blocks, FlashPrefill V2 (arXiv 2608.19758), which chooses blocks by
    their means alone.
    """

    coverage: float = 0.985
    tile: int = 64
    block: int = 64
    near: int = 64
    landmarks: int = 32
    queries: int = 16
    few: int = 64
    shortest: int = 1024

    def __post_init__(self) -> None:
        if not isinstance(self.coverage, int | float) or not 0 < self.coverage <= 1:
            raise ValueError(f"coverage={self.coverage!r} must be a number above 0 and at most 1")
        for name in ("tile", "block", "near", "landmarks", "queries", "few", "shortest"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise ValueError(f"{name}={value!r} must be an integer")
            least = 1 if name in ("tile", "block", "landmarks", "queries") else 0
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if self.landmarks > self.block:
            raise ValueError(
                f"landmarks={self.landmarks} must be at most block={self.block}: they are its keys"
            )

    def applies(self, q_len: int, k_len: int) -> bool:
        """Say whether a call is long enough; else it runs dense."""
        return q_len > self.few and k_len >= self.shortest


class Ran(NamedTuple):
    """What a call did, in (query, key) pairs of all heads and batch rows; a summary is one key.

    Attributes:
        causal: Pairs of plain causal attention.
        shown: ``[]`` int64: pairs that the choice shows.
        computed: ``[]`` int64: pairs that were evaluated, masked ones included.
        impl: The backend that ran.
    """

    causal: int
    shown: Tensor
    computed: Tensor
    impl: str


def dynamic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    settings: Dynamic,
    *,
    scale: float | None = None,
    impl: str = "auto",
    clock: AbstractContextManager[object] | None = None,
) -> tuple[Tensor, Ran]:
    """Attend causally under masks that are chosen from these queries and keys.

    Rows stand at the last ``Q`` of the ``K`` key slots. All batch rows are whole sequences without
    padding. The query heads of a kv head share their choice. Memory is linear in ``K``: tiles run
    in parts, and no part holds more than a fixed number of cells.

    Args:
        q: ``[B, H, Q, D]``.
        k: ``[B, G, K, D]``, ``H % G == 0``.
        v: ``[B, G, K, D]``.
        settings: How to choose.
        scale: Factor of the logits; ``D ** -0.5`` by default.
        impl: "auto": on the CPU each tile's keys are gathered ("cpu"), unless gradients are asked
            for; elsewhere what `dynmask.ops.attention` takes. Or a backend by its name.
        clock: Entered, again and again, around all that is not attention itself.

    Returns:
        ``[B, H, Q, D]`` in q's dtype, and what was done.

    Raises:
        ValueError: The shapes do not fit together, or the backend cannot run the call.
    """
    check(q, k, v, None, None)
    if q.numel() == 0:
        raise ValueError(f"q has no rows, {list(q.shape)}: leave the call out")
    clock = nullcontext() if clock is None else clock
    scale = q.shape[3] ** -0.5 if scale is None else scale
    gathered = runs_gathered(q, k, v, impl)
    q_len, k_len = q.shape[2], k.shape[2]
    begin = k_len - q_len
    with clock:
        keys = Keys.build(k, v, block=settings.block, tile=settings.tile, marks=settings.landmarks)
    outs, shown, computed = [], [], []
    for first, last in _parts(q, k, settings):
        part = q[:, :, first - begin : last - begin]
        with clock, torch.no_grad():
            choice = select(part, keys, settings, first=first, scale=scale)
            shown.append(choice.shown_pairs(first, last))
        if gathered:
            out = attend_gathered(part, keys, choice, first=first, scale=scale)
            pairs, ran = choice.gathered_pairs(first, last), "cpu"
        else:
            out, ran = _attend(part, keys, choice, last, scale, impl, clock)
            # Dense kernels evaluate every pair, whatever the mask shows.
            every = k.shape[0] * k.shape[1] * (last * (last + 1) - first * (first + 1)) // 2
            pairs = shown[-1] if ran == "triton" else torch.tensor(every, device=q.device)
        computed.append(pairs)
        outs.append(out)
    causal = q.shape[0] * q.shape[1] * (k_len * (k_len + 1) - begin * (begin + 1)) // 2
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
    ratio = q.shape[1] // k.shape[1]
    shown_pairs = torch.stack(shown).sum() * ratio
    # The same tensors where the masks are all that is computed.
    same = all(a is b for a, b in zip(shown, computed, strict=True))
    return out, Ran(
        causal, shown_pairs, shown_pairs if same else torch.stack(computed).sum() * ratio, ran
    )


def runs_gathered(q: Tensor, k: Tensor, v: Tensor, impl: str) -> bool:
    """Say whether a call's tiles run over gathered keys on the CPU.

    Raises:
        ValueError: ``impl="cpu"`` for tensors that are not on the CPU, or with gradients.
    """
    fits = q.device.type == "cpu" and not wants_gradients(q, k, v)
    if impl == "cpu" and not fits:
        why = f"these are on {q.device}" if q.device.type != "cpu" else "call torch.no_grad()"
        raise ValueError(f'impl="cpu" needs CPU tensors without gradients: {why}')
    return fits and impl in ("auto", "cpu")


def _parts(q: Tensor, k: Tensor, settings: Dynamic) -> Iterator[tuple[int, int]]:
    """Cut the rows into parts that end where tiles end; yield ``(first, last)`` positions."""
    batch, groups, k_len = k.shape[:3]
    q_len, tile = q.shape[2], settings.tile
    of_tile, cells = 1, _CPU_CELLS
    if q.device.type != "cpu":
        of_tile, cells = k_len, _CELLS
    of_rows = q.shape[1] // groups * tile
    marks, queries = settings.landmarks, min(settings.queries, of_rows)
    # Kernels keep neither logits nor products.
    if by_kernels(q, "block_costs", marks=marks, queries=queries) is None:
        near = settings.near + settings.block + tile
        of_tile = max(of_tile, queries * (k_len // settings.block * marks + near))
    if by_kernels(q, "landmarks", cells=of_rows * q.shape[3]) is None:
        of_tile = max(of_tile, of_rows**2)
    rows = cells // (batch * groups * of_tile) * tile
    first = k_len - q_len
    while first < k_len:
        last = min(first // tile * tile + max(rows, tile), k_len)
        yield first, last
        first = last


def _attend(
    q: Tensor,
    keys: Keys,
    choice: Choice,
    last: int,
    scale: float,
    impl: str,
    clock: AbstractContextManager[object],
) -> tuple[Tensor, str]:
    """Attend one part by the engine, summaries first."""
    end = keys.summaries + last
    k, v, bias = keys.k[:, :, :end], keys.v[:, :, :end], keys.bias[:, :, :end]
    list_keys, attend = by_kernels(q, "choice_lists"), by_kernels(q, "attend_listed")
    if list_keys and attend and impl in ("auto", "triton") and not wants_gradients(q, k, v):
        with clock:
            lists = list_keys(choice, keys, last)
        return attend(q, k, v, bias, lists, tile=choice.tile, scale=scale), "triton"
    with clock:
        mask = choice.blocks(keys, last)
    impl = resolve(impl, q, k, v, mask, bias=bias)
    return attention(q, k, v, mask, bias=bias, scale=scale, impl=impl), impl
