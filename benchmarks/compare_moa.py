"""What each head of a model loses by a window: the profile that MoA chooses spans from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dynmask.baselines.moa_spans import span_at


def rules(lengths: Sequence[int], *, sinks: int) -> list[tuple[float, float]]:
    """Candidates ``(alpha, beta)``: half a window and half a share of the length, and mixtures."""
    longest = max(lengths)
    alphas = [sinks + longest * share for share in (0.0, 0.01, 0.03, 0.06, 0.12, 0.25)]
    betas = [0.0, 0.01, 0.03, 0.06, 0.12, 0.25, 0.5]
    return [(0.0, 1.0)] + [(round(a), b) for a in alphas for b in betas]


def influence(
    model: Any,
    windows: Sequence[Sequence[Sequence[int]]],
    *,
    rules: Sequence[tuple[float, float]],
    sinks: int,
) -> Tensor:
    """Return ``[layers, heads, rules, lengths]`` for `MoA.from_influence`.

    Args:
        model: A causal language model of transformers; run with eager attention.
        windows: For each length the token ids of its windows.
        rules: Candidates.
        sinks: First keys that every row sees.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        columns = []
        for of_length in windows:
            hidden = torch.stack([_far(model, ids, sinks) for ids in of_length]).mean(0)
            columns.append(_by_rule(hidden, rules, sinks))
    finally:
        model.set_attn_implementation(before)
    return torch.stack(columns, -1)


def _by_rule(far: Tensor, rules: Sequence[tuple[float, float]], sinks: int) -> Tensor:
    """``far [layers, heads, N]``, the influence at each distance, summed over what rules hide."""
    length = far.shape[-1]
    # Entry r: all distances from r on; the last entry is nothing.
    beyond = functional.pad(far.flip(-1).cumsum(-1).flip(-1), (0, 1))
    spans = [span_at(a, b, length, sinks=sinks) for a, b in rules]
    at = [length if span >= length else span - sinks for span in spans]
    return beyond[..., torch.tensor(at)]


def _far(model: Any, ids: Sequence[int], sinks: int) -> Tensor:
    """Return ``[layers, heads, N]``: |E| of `MoA.from_influence` by distance, sinks left out."""
    tokens = torch.tensor([list(ids)], device=next(model.parameters()).device)
    with torch.enable_grad():
        output = model(input_ids=tokens, output_attentions=True, use_cache=False)
        loss = functional.cross_entropy(output.logits[0, :-1].float(), tokens[0, 1:])
        gradients = torch.autograd.grad(loss, output.attentions)
    layers = []
    for attention, gradient in zip(output.attentions, gradients, strict=True):
        a, g = attention[0].detach().float(), gradient[0].float()
        e = a / (1 - a).clamp_min(1e-6) * ((a * g).sum(-1, keepdim=True) - g)
        # As in the authors' code: by its sign E would have much of the attention do harm.
        e = e.abs()
        # A row with one key has nothing to hide; and sinks are always seen.
        e = torch.where(a < 1 - 1e-6, e, 0)
        e[..., :sinks] = 0
        length = e.shape[-1]
        row = torch.arange(length, device=e.device)
        apart = (row[:, None] - row).clamp_min(0)
        e = e.tril()
        sums = e.new_zeros(e.shape[0], length).scatter_add_(
            1, apart.flatten().expand(e.shape[0], -1), e.flatten(1)
        )
        layers.append(sums)
    return torch.stack(layers).cpu()
