"""Loss of every token of a long window without all its logits at one time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from dynmask.eval.runner import input_device, logits_for_last

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 512
"""Positions whose logits exist at one time."""


def token_nll(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """The negative log-likelihood of each token but the first, in nats.

    The model runs once over the whole window. Its logits are then computed `ROWS` positions at a
    time and in fp32 only within such a chunk, so that [N, V] never exists.

    Args:
        model: any causal language model of transformers.
        ids: N token ids, at least 2.

    Returns:
        [N - 1] fp32 on the CPU.
    """
    device = input_device(model)
    tokens = torch.tensor([list(ids)], device=device)
    targets = tokens[0, 1:]
    losses = []
    with _logits(model, tokens) as rows:
        for start in range(0, len(targets), ROWS):
            stop = min(start + ROWS, len(targets))
            logits = rows(start, stop).float()
            losses.append(functional.cross_entropy(logits, targets[start:stop], reduction="none"))
    return torch.cat(losses).cpu()


@contextmanager
def _logits(model: PreTrainedModel, tokens: Tensor) -> Iterator[Callable[[int, int], Tensor]]:
    """Yield ``rows(start, stop)``: the logits [stop - start, V] there of `tokens` [1, N].

    Between the trunk's output and the logits stand the output head and whatever the architecture
    adds to it (a soft cap, a scale). To get all that right for every architecture, the model's own
    forward runs for each chunk of positions, on a trunk that for this time only gives back what it
    has computed once.
    """
    trunk = model.base_model
    if trunk is model or not logits_for_last(model):
        logits = model(input_ids=tokens, use_cache=False).logits[0]
        yield lambda start, stop: logits[start:stop]
        return
    outputs: list[Any] = []
    hook = trunk.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()

    def rows(start: int, stop: int) -> Tensor:
        keep = torch.arange(start, stop, device=tokens.device)
        return model(input_ids=tokens, use_cache=False, logits_to_keep=keep).logits[0]

    own = trunk.__dict__.get("forward")
    trunk.__dict__["forward"] = lambda *args, **kwargs: outputs[0]
    try:
        yield rows
    finally:
        del trunk.__dict__["forward"]
        if own is not None:
            trunk.__dict__["forward"] = own
