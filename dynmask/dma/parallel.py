"""Context parallel prefill: each process reads its share of a prompt."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from dynmask.dma.cache import LifetimeCache
from dynmask.dma.cache_layer import LifetimeLayer
from dynmask.dma.exchange import Keys, best, gathered, joined
from dynmask.dma.modeling import DmaForCausalLM
from dynmask.dma.selection import keep_of
from dynmask.masks import Lifetimes


class Prefill(NamedTuple):
    """What `context_prefill` leaves in each process.

    Attributes:
        logits: ``[B, 1, vocab_size]``, of the prompt's last token; the same in all processes.
        past_key_values: The cache after the whole prompt; the same keys in all processes.
        last_hidden_state: ``[B, n, hidden_size]``, of the tokens that this process read.
        start: Place of the first of them in the prompt.
    """

    logits: Tensor
    past_key_values: LifetimeCache
    last_hidden_state: Tensor
    start: int


@torch.no_grad()
def context_prefill(
    model: DmaForCausalLM,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    past_key_values: LifetimeCache | None = None,
    group: dist.ProcessGroup | None = None,
) -> Prefill:
    r"""Read a prompt with all processes of a group, each an equal share of neighbouring tokens.

    All but attention is row by row. A key's score does not depend on the query, so of the tokens
    before its own a process needs the ``w`` keys that are kept there, and those are the best ``w``
    of the best ``w`` of each process before it. So in each layer every process chooses among its
    own keys, all processes exchange what they chose, ``w`` keys, values and scores for each kv
    head, and each attends to the best of what came before and to its own tokens. No process waits
    for the one before it. Outputs are those of one process within rounding: the keys that a row
    sees are the same, their sums may run in another order.

    After it every process holds the whole prompt's `LifetimeCache`, and goes on alone or, all with
    the same tokens, together: ``model.generate`` takes the cache with the whole prompt and more
    behind it. A prompt too long for the activations of one call is read in several, one after the
    other, each with the cache of the one before. For inference: nothing has a gradient.

    With a ``window`` the keys that a process chooses are its last ones and the best of the others.
    Without a bound (``keep=None``, or a ``keep`` above the share) whole shares are exchanged.

    Args:
        model: The same in all processes of the group, or split by tensor parallelism over others.
        input_ids: ``[B, N]``, the whole prompt, the same in all processes.
        attention_mask: ``[B, cached + N]``, 1 for real tokens, 0 for padding; None if all are real.
        past_key_values: The cache of what came before the prompt, the same keys in all processes;
            it is added to. None to begin.
        group: Processes that share the prompt; None for all.

    Returns:
        Logits, cache and this process's hidden states.

    Raises:
        ValueError: torch.distributed is not initialized; there are fewer tokens than processes;
            they differ between processes; a shape does not fit; or the cache is offloaded or has
            another number of layers.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "context_prefill needs processes that know each other: start them with torchrun and "
            "call torch.distributed.init_process_group first"
        )
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    cache = LifetimeCache(model.config) if past_key_values is None else past_key_values
    if cache.offloading or len(cache.layers) != model.config.num_hidden_layers:
        raise ValueError(
            "past_key_values is offloaded, or not of this model: pass LifetimeCache(model.config)"
        )
    batch, length = input_ids.shape
    past = cache.get_seq_length()
    if length < size:
        raise ValueError(f"input_ids hold {length} tokens for {size} processes: give at least one")
    if attention_mask is not None and attention_mask.shape != (batch, past + length):
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)} but must be {[batch, past + length]}: "
            "one entry for each token, cached ones included"
        )
    _check_same(input_ids, past, group)
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    counts = [length // size + (r < length % size) for r in range(size)]
    start = sum(counts[:rank])
    stop = start + counts[rank]
    share = _Share(cache, model.config, counts, attention_mask is not None, group)
    hidden = model.model(
        input_ids=input_ids[:, start:stop],
        attention_mask=None if attention_mask is None else attention_mask[:, : past + stop],
        past_key_values=share,
        use_cache=True,
    ).last_hidden_state
    last = hidden[:, -1:].clone(memory_format=torch.contiguous_format)  # It is written to.
    of_last = size - 1 if group is None else dist.get_global_rank(group, size - 1)
    dist.broadcast(last, of_last, group=group)
    return Prefill(model.lm_head(last), cache, hidden, start)


class _Share(LifetimeCache):
    """One process's view of a cache while all read a prompt into it.

    Args:
        whole: The cache.
        config: Of the model.
        counts: Tokens that each process reads.
        padded: Whether any process reads padding.
        group: The processes.
    """

    def __init__(
        self, whole: LifetimeCache, config: Any, counts: list[int], padded: bool, group: Any
    ):
        super().__init__()
        self.layers = whole.layers
        self._config, self._counts, self._padded, self._group = config, counts, padded, group
        self._rank = dist.get_rank(group)
        self._past = whole.get_seq_length()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens before this process's own."""
        return self._past + sum(self._counts[: self._rank])

    @torch.compiler.disable
    def extend(
        self,
        k: Tensor,
        v: Tensor,
        score: Tensor,
        layer_idx: int,
        *,
        keep: int | None,
        threshold: float | None = None,
        window: int = 0,
        present: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Lifetimes]:
        """Exchange keys with the other processes; see `LifetimeCache.extend`."""
        held: Any = self.layers[layer_idx]
        total, rank = sum(self._counts), self._rank
        # What the layer names would be a share of these tokens, not of the prompt.
        begun = held.get_seq_length() > 0
        share = isinstance(self._config.keep, float)
        keep = held.keep if begun and share else keep_of(self._config.keep, layer_idx, total)
        if keep is not None:
            window = min(self._config.window, keep)
        rule: dict[str, Any] = {"keep": keep, "threshold": threshold, "window": window}
        own = Keys(k, v, score.float(), _flags(k, present) if self._padded else None)
        width = min(total if keep is None else keep, max(self._counts))
        parts = gathered(
            best(own, width, threshold, min(window, width)), self._counts, width, self._group
        )
        # The last process attends to all that will be held.
        here = held if rank == len(parts) - 1 else copy.deepcopy(held)
        if rank:
            _take_in(here, joined(parts[:rank]), rule)
        (k, v), (bias, mask) = here.update(own.k, own.v, own.score, present=own.present, **rule)
        if here is not held:
            _take_in(held, joined(parts), rule)
        held.tell_length(self._past + total)
        return k, v, bias, mask


def _take_in(layer: LifetimeLayer, keys: Keys, rule: dict[str, Any]) -> None:
    layer.update(keys.k, keys.v, keys.score, present=keys.present, **rule)


def _flags(k: Tensor, present: Tensor | None) -> Tensor:
    if present is not None:
        return present
    return torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)


def _check_same(input_ids: Tensor, past: int, group: Any) -> None:
    """Refuse prompts that differ between processes, which would read parts of several."""
    place = torch.arange(1, input_ids.numel() + 1, device=input_ids.device).view(input_ids.shape)
    told = torch.tensor([*input_ids.shape, past, 0], device=input_ids.device)
    told[3] = (input_ids * place).sum()
    of_all = [torch.empty_like(told) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_all, told, group=group)
    if any(not torch.equal(told, other) for other in of_all):
        raise ValueError(
            "input_ids or the cache differ between processes: give all the whole prompt and the "
            "same cache, context_prefill takes each its share"
        )
