"""Time the `cpu` backend under `Lifetimes.top` against torch's causal SDPA kernel, same cores.

    python benchmarks/lifetimes_cpu.py [--threads N] [--longest 16384] [--rounds 5] [--out FILE]

Every round runs SDPA (is_causal=True), the attention alone and selection plus attention, so all
see the same machine; a ratio is the median over rounds of SDPA's time / ours. Above 1 we are
faster. The attention's time includes its schedule, made anew for every call as in a model, where
each layer has its own scores. A cell is timed only after the selected keys agreed with topk and
the output with the reference backend.
"""

import os
from collections.abc import Callable

import torch
from stripes_cpu import DIM, GROUPS, HEADS, LENGTHS, in_turn, options, quartiles, write
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dynmask.masks import Lifetimes
from dynmask.ops import attention, choose, computed_pairs

KEEPS = (256, 1024, 4096)
# Local scores rise by this much a token beside noise of variance 1: most kept keys are recent.
SLOPE = 0.002


def scores(kind: str, length: int) -> Tensor:
    """Return ``[1, G, K]``: independent scores, or scores that prefer recent keys."""
    noise = torch.randn(1, GROUPS, length, generator=torch.Generator().manual_seed(1))
    return noise if kind == "iid" else noise + SLOPE * torch.arange(length)


def gate(q: Tensor, k: Tensor, v: Tensor, score: Tensor, keep: int) -> float:
    """Hold three blocks of rows to topk and to the reference; raise unless they agree."""
    length = q.shape[2]
    mask = Lifetimes.top(score, keep=keep)
    out = attention(q, k, v, mask, impl="cpu")
    worst = 0.0
    for first in {0, length // 2, length - 64}:
        seen = mask.slots(first, first + 64, length)
        for row in range(64):
            best = score[..., : first + row + 1].topk(min(keep, first + row + 1)).indices
            expected = torch.zeros(1, GROUPS, length, dtype=torch.bool).scatter_(2, best, True)
            if not torch.equal(seen[:, :, row], expected):
                raise SystemExit(f"wrong keys in row {first + row} of {length} with keep {keep}")
        part = Lifetimes(mask.expiry[..., : first + 64])
        keys = slice(0, first + 64)
        rows = slice(first, first + 64)
        expected = attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], part, impl="reference")
        worst = max(worst, float((out[:, :, rows] - expected).abs().max()))
    if not worst < 1e-4:
        raise SystemExit(f"wrong result at {length} tokens with keep {keep}: error {worst}")
    return worst


def measure(length: int, keep: int, kind: str, q_len: int, rounds: int) -> dict:
    """Time one length, keep and kind of scores; ``q_len`` 1 is decode, without its selection."""
    torch.manual_seed(0)
    q = torch.randn(1, HEADS, length, DIM)
    k, v = torch.randn(2, 1, GROUPS, length, DIM)
    score = scores(kind, length)
    error = gate(q, k, v, score, keep)
    mask = Lifetimes.top(score, keep=keep)
    q = q[:, :, length - q_len :]
    runs: dict[str, Callable[[], object]] = {
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=q_len > 1, enable_gqa=True),
        "attention": lambda: attention(q, k, v, Lifetimes(mask.expiry), impl="cpu"),
    }
    if q_len > 1:
        runs["with selection"] = lambda: attention(
            q, k, v, Lifetimes.top(score, keep=keep), impl="cpu"
        )
    times = in_turn(runs, rounds, repeats=20 if q_len == 1 else max(1, 2048 // length))
    causal = q_len * length - q_len * (q_len - 1) // 2
    computed = computed_pairs(mask, q_len, ratio=HEADS // GROUPS)
    first = length - q_len
    visible = (mask.expiry.clamp_max(length) - torch.arange(length).clamp_min(first)).clamp_min(0)
    return {
        "call": "prefill" if q_len > 1 else "decode",
        "length": length,
        "keep": keep,
        "scores": kind,
        "density": float(visible.sum(-1).double().mean() / causal),
        "density_computed": float(computed.double().mean() / causal),
        "seconds": {name: quartiles(spent) for name, spent in times.items()},
        "ratio": {
            name: quartiles([s / t for s, t in zip(times["sdpa"], spent, strict=True)])
            for name, spent in times.items()
            if name != "sdpa"
        },
        "auto": choose(q, k, v, mask),
        "error": error,
    }


def show(cells: list[dict]) -> None:
    """Print one line per cell."""
    print(f"{'call':8}{'tokens':>7}{'keep':>6} {'scores':7}{'density':>8}{'computed':>9}", end="")
    print(f"{'sdpa ms':>10}{'cpu ms':>9}{'ratio':>7} {'quartiles':>14}{'+select':>9}", end="")
    print(f" {'quartiles':>14}  auto")
    for c in cells:
        print(f"{c['call']:8}{c['length']:7d}{c['keep']:6d} {c['scores']:7}", end="")
        print(f"{c['density']:8.3f}{c['density_computed']:9.3f}", end="")
        print(f"{c['seconds']['sdpa'][1] * 1e3:10.2f}", end="")
        print(f"{c['seconds']['attention'][1] * 1e3:9.2f}", end="")
        low, middle, high = c["ratio"]["attention"]
        print(f"{middle:7.2f} {f'{low:.2f} .. {high:.2f}':>14}", end="")
        if "with selection" in c["ratio"]:
            low, middle, high = c["ratio"]["with selection"]
            print(f"{middle:9.2f} {f'{low:.2f} .. {high:.2f}':>14}", end="")
        else:
            print(f"{'':24}", end="")
        print(f"  {c['auto']}")


def main() -> None:
    given = options(__doc__ or "", rounds=5)
    load = [os.getloadavg()[0]]
    cells = []
    with torch.inference_mode():
        for length in LENGTHS:
            if length > given.longest:
                continue
            for keep in KEEPS:
                if keep >= length:
                    continue
                for kind, q_len in (("iid", length), ("local", length), ("iid", 1)):
                    cells += [measure(length, keep, kind, q_len, given.rounds)]
            print(f"{length} tokens: done", flush=True)
            load.append(os.getloadavg()[0])
    cells.sort(key=lambda c: c["call"], reverse=True)
    show(cells)
    write(
        given,
        cells,
        load,
        local_scores=f"standard normal + {SLOPE} a token",
        seconds="quartiles over rounds; ratio = sdpa / ours within a round",
    )


if __name__ == "__main__":
    main()
