"""``dynmask bench table2``: the kernel table of the DMA paper, against SDPA with a dense mask.

Source: arXiv 2508.02124, Table 2: H 2, G 1, D 128, w 2048 on an RTX 4090. There as here SDPA's
mask is made beforehand and not timed. Ours holds everything: selection, schedule and attention, or
one step of decoding.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dynmask.bench import dense, gate
from dynmask.bench.decode import BoundedStep, with_graph
from dynmask.bench.engine import Engine
from dynmask.bench.inputs import Inputs, Settings, make_inputs, make_score
from dynmask.bench.op import part
from dynmask.bench.timing import Clock, measure, ratio
from dynmask.masks import Lifetimes

PAPER = {
    ("prefill", 4096): 10.9,
    ("prefill", 16384): 10.8,
    ("prefill", 32768): 15.5,
    ("decode", 32768): 11.2,
    ("decode", 65536): 15.5,
}
"""The paper's own ratios, of its kernel without making the mask, on an RTX 4090."""

_PEER = "flash_sparse_attn.deprecated.flash_sparse_attn_triton"
_CELLS = 1 << 26


def cells(settings: Settings, engine: Engine, clock: Clock, length: int) -> list[dict[str, Any]]:
    """Measure one length as prefill (as many rows as keys) and as decode (one row).

    ``decode`` selects over the whole cache in each call. ``bounded`` is what decoding does: a cache
    of ``keep`` slots takes in the new token and its row attends; there is one where some key is
    evicted at all.
    """
    calls = ["prefill", "decode"]
    if length > settings.keep:
        calls.append("bounded")
    return [
        _cell(settings, engine, clock, length, call, kind)
        for kind in settings.scores
        for call in calls
    ]


def _cell(
    settings: Settings, engine: Engine, clock: Clock, length: int, call: str, kind: str
) -> dict[str, Any]:
    cell: dict[str, Any] = {"length": length, "call": call, "score": kind, "status": "ok"}
    cell["paper"] = PAPER.get(("prefill" if call == "prefill" else "decode", length))
    inputs = make_inputs(settings, length, q_len=length if call == "prefill" else 1)
    q_len = inputs.q.shape[2]
    score = make_score(settings, kind, length)
    # SDPA and the peer take the bias in q's dtype: all get the same rounded values.
    bias = score.to(inputs.q.dtype).float()
    if call == "bounded":
        score = bias  # The cache holds one of the two.
    keep = settings.keep
    rows = gate.sample_rows(length, keep=keep, q_len=q_len)
    try:
        mask = engine.select(score, keep, length - q_len)
        gate.check_selection(mask, score, keep, rows)
        if call == "bounded":
            step = BoundedStep(engine, inputs, score, keep)
            cell["gate"] = gate.check_rows(step(), inputs, score, bias, keep, rows)
            ours, no_graph = with_graph(step, clock, step.restore)
        else:
            out = engine.attend(*inputs, mask, bias)
            cell["gate"] = gate.check_rows(out, inputs, score, bias, keep, rows)
            ours, no_graph = with_graph(lambda: engine.everything(inputs, score, bias, keep), clock)
    except gate.GateError as error:
        return cell | {"status": "error", "error": str(error)}
    runs = {f"ours {name}": run for name, run in ours.items()}
    if call != "bounded":
        attention, _ = with_graph(lambda: engine.attend(*inputs, mask, bias), clock)
        runs |= {f"attention {name}": run for name, run in attention.items()}
    peers, failed = _peers(inputs, mask, score, bias, keep, rows)
    for name, peer in peers.items():
        both, reason = with_graph(peer, clock)
        if reason and clock.device.type == "cuda":
            failed[f"{name} graph"] = reason
        runs |= {f"{name} {way}": run for way, run in both.items()}
    times = measure(
        runs, clock, rounds=settings.rounds, warmups=settings.warmups, budget=settings.budget
    )
    cell |= {
        "times": {name: time.to_dict() for name, time in times.items()},
        "failed": failed,
        "no_graph": no_graph,
    }
    for way in ours:
        sdpa = {
            name: time for name, time in part(times, "sdpa").items() if name.endswith(f" {way}")
        }
        if sdpa:
            best = dense.fastest(sdpa)
            cell[f"fastest_{way}"] = best.removesuffix(f" {way}")
            cell[f"ratio_{way}"] = ratio(sdpa[best], times[f"ours {way}"])
        if f"peer {way}" in times:
            cell[f"peer_{way}"] = ratio(times[f"peer {way}"], times[f"ours {way}"])
    return cell


def _peers(
    inputs: Inputs,
    mask: Lifetimes,
    score: Tensor,
    bias: Tensor,
    keep: int,
    rows: list[int],
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Return what runs under a dense mask and is right, and why the others do not or are not."""
    q, k, v = inputs
    usable: dict[str, Callable[[], Tensor]] = {}
    failed: dict[str, str] = {}

    def consider(name: str, call: Callable[[], Tensor]) -> None:
        try:
            gate.check_rows(call(), inputs, score, bias, keep, rows, allowed=gate.OTHERS)
        except Exception as error:  # another library's kernel can raise anything
            failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        else:
            usable[name] = call

    hidden = float("-inf")
    additive = _dense_mask(inputs, mask, bias, hidden)
    by_head = [dense.by_head(keys, q.shape[1]) for keys in (k, v)]
    for name, attend in dense.masked(additive).items():
        consider(f"sdpa {name}", partial(attend, q, *by_head))
    if q.device.type == "cuda":
        try:
            peer = importlib.import_module(_PEER).triton_sparse_attn_func
        except Exception as error:  # absent, or made for another Triton
            failed["peer"] = f"{type(error).__name__}: {error}"
        else:
            # It hides what is negative, wants tokens before heads, and adds the rest.
            shown = additive.masked_fill(additive == hidden, -1.0)
            turned = [tensor.transpose(1, 2).contiguous() for tensor in inputs]
            consider(
                "peer",
                lambda: peer(*turned, shown, True, 1 / math.sqrt(q.shape[3])).transpose(1, 2),
            )
    return usable, failed


def _dense_mask(inputs: Inputs, mask: Lifetimes, bias: Tensor, hidden: float) -> Tensor:
    """Return ``[B, H, Q, K]`` in q's dtype, made block by block."""
    batch, heads, q_len, _ = inputs.q.shape
    k_len = inputs.k.shape[2]
    dense_mask = torch.empty(
        batch, heads, q_len, k_len, dtype=inputs.q.dtype, device=inputs.q.device
    )
    slot = torch.arange(k_len, device=inputs.q.device)
    step = max(1, _CELLS // (batch * heads * k_len))
    for top in range(0, q_len, step):
        row = slot[k_len - q_len + top : k_len - q_len + min(q_len, top + step), None]
        seen = (slot <= row) & (row < mask.expiry[:, :, None])
        block = torch.where(seen, bias[:, :, None], hidden).to(dense_mask.dtype)
        dense_mask[:, :, top : top + step] = dense.by_head(block, heads)
    return dense_mask
