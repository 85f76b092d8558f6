"""Time forward and backward pass of DMA's op on a CPU against torch's causal SDPA, same cores.

    python benchmarks/lifetimes_cpu_train.py [--threads N] [--longest 16384] [--rounds 5] [--out F]

Every round runs causal SDPA, the `cpu` backend and, up to 4,096 tokens, torch's SDPA under the
same mask as a matrix, each with all gradients; ours with the score as bias, and its selection and
schedule made anew. A ratio is the median over rounds of SDPA's time / ours: above 1 we are faster.
A cell is timed only after its gradients agreed with those of SDPA under the mask, on the first
4,096 tokens.
"""

import os
from collections.abc import Callable

import torch
from lifetimes_cpu import KEEPS, scores
from stripes_cpu import DIM, GROUPS, HEADS, LENGTHS, in_turn, options, quartiles, write
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dynmask.masks import Lifetimes
from dynmask.ops import attention, choose

DENSE = 4096
"""Tokens beyond which no masked SDPA is run."""


def gradients(inputs: list[Tensor], keep: int, impl: str) -> list[Tensor]:
    """Of q, k, v and score, for the sum of a weighted output."""
    q, k, v, score = (x.detach().requires_grad_() for x in inputs)
    mask = Lifetimes.top(score.detach(), keep=keep)
    out = attention(q, k, v, mask, bias=score, impl=impl)
    return list(torch.autograd.grad((out * out.detach().sin()).sum(), (q, k, v, score)))


def gate(inputs: list[Tensor], keep: int) -> float:
    """Hold the gradients to those of SDPA under the mask; raise unless they agree."""
    short = [x[:, :, :DENSE] for x in inputs]
    pairs = zip(gradients(short, keep, "cpu"), gradients(short, keep, "sdpa"), strict=True)
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    if not worst < 1e-4:
        raise SystemExit(f"wrong gradients with keep {keep}: relative error {worst}")
    return worst


def measure(length: int, keep: int, kind: str, rounds: int) -> dict:
    """Time one length, keep and kind of scores."""
    torch.manual_seed(0)
    q = torch.randn(1, HEADS, length, DIM)
    k, v = torch.randn(2, 1, GROUPS, length, DIM)
    inputs = [q, k, v, scores(kind, length)]
    error = gate(inputs, keep)

    def dense() -> object:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        return torch.autograd.grad((out * out.detach().sin()).sum(), leaves)

    runs: dict[str, Callable[[], object]] = {
        "sdpa": dense,
        "cpu": lambda: gradients(inputs, keep, "cpu"),
    }
    if length <= DENSE:
        runs["sdpa under the mask"] = lambda: gradients(inputs, keep, "sdpa")
    times = in_turn(runs, rounds)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    return {
        "length": length,
        "keep": keep,
        "scores": kind,
        "seconds": {name: quartiles(spent) for name, spent in times.items()},
        "ratio": {
            name: quartiles([s / t for s, t in zip(spent, times["cpu"], strict=True)])
            for name, spent in times.items()
            if name != "cpu"
        },
        "auto": choose(*leaves, Lifetimes.top(inputs[3], keep=keep), bias=inputs[3]),
        "error": error,
    }


def show(cells: list[dict]) -> None:
    """Print one line per cell."""
    print(f"{'tokens':>7}{'keep':>6} {'scores':7}{'sdpa ms':>10}{'cpu ms':>9}{'ratio':>7}", end="")
    print(f" {'quartiles':>14}{'masked':>8}  auto")
    for c in cells:
        low, middle, high = c["ratio"]["sdpa"]
        masked = c["ratio"].get("sdpa under the mask")
        print(
            f"{c['length']:7d}{c['keep']:6d} {c['scores']:7}{c['seconds']['sdpa'][1] * 1e3:10.1f}"
            f"{c['seconds']['cpu'][1] * 1e3:9.1f}{middle:7.2f} {f'{low:.2f} .. {high:.2f}':>14}"
            f"{'' if masked is None else format(masked[1], '.2f'):>8}  {c['auto']}"
        )


def main() -> None:
    given = options(__doc__ or "", rounds=5)
    load = [os.getloadavg()[0]]
    cells = []
    for length in LENGTHS:
        if length > given.longest:
            continue
        for keep in KEEPS:
            if keep >= length:
                continue
            cells += [measure(length, keep, kind, given.rounds) for kind in ("iid", "local")]
        print(f"{length} tokens: done", flush=True)
        load.append(os.getloadavg()[0])
    show(cells)
    write(
        given,
        cells,
        load,
        seconds="quartiles over rounds, forward and backward; ratio = that / ours within a round",
    )


if __name__ == "__main__":
    main()
