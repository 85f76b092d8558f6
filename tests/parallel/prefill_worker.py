"""Prompts read by all processes together, beside the same model reading them alone."""

import copy
import sys
from functools import partial

import dma_models
import pytest
import torch
from dma_models import random_ids
from parallel_cases import run
from torch import distributed as dist

from dynmask.dma import LifetimeCache
from dynmask.dma.parallel import context_prefill

KEEPS = {
    "keep 7": {"keep": 7},
    "by layer": {"keep": [7, None, 30]},
    "share": {"keep": 0.3},
    "threshold": {"keep": 9, "threshold": 1.0},
    "threshold below 0": {"keep": 20, "threshold": -0.3, "score": "linear"},
    "threshold alone": {"keep": None, "threshold": 1.0},
    "keep all": {"keep": 300},
    "window": {"keep": 9, "window": 4},
    "window alone": {"keep": 6, "window": 6},
    "window of a share": {"keep": 0.3, "window": 5},
    "window, by layer": {"keep": [7, None, 30], "window": 7, "threshold": 1.0},
    "window and threshold": {"keep": 20, "window": 8, "threshold": -0.3, "score": "linear"},
}
PADDED = {"": (0, 0), ", left": (1, 0), ", right": (0, 1), ", both": (1, 1)}
NEW = {"min_new_tokens": 9, "max_new_tokens": 9, "do_sample": False}


def make_model(**changes):
    """In float64: in float32 a score that is rounded otherwise can change the last key kept."""
    return dma_models.make_model(**changes).double()


def close(a, b):
    # Scores are kept in float32, and are the bias.
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def padding(length, left, right):
    """Row 0 padded at the left by more than half, row 1 at the right."""
    mask = torch.ones(2, length, dtype=torch.int64)
    most = length // 2 + 1 if length > 4 else 1
    mask[0, : left * most] = 0
    mask[1, length - right * most :] = 0
    return mask


@torch.no_grad()
def same_rows(changes, sides):
    model = make_model(**changes)
    for length in (dist.get_world_size(), 5, 13, 14, 101):
        ids, mask = random_ids(2, length), padding(length, *sides)
        inputs = {} if sides == (0, 0) else {"attention_mask": mask}
        wanted = model(ids, use_cache=True, **inputs)
        rows = model.model(ids, **inputs).last_hidden_state
        found = context_prefill(model, ids, **inputs)
        stop = found.start + found.last_hidden_state.shape[1]
        assert stop - found.start in (length // 2, -(-length // 2))
        real = mask[:, found.start : stop].bool()
        close(found.last_hidden_state[real], rows[:, found.start : stop][real])
        close(found.logits[mask[:, -1] > 0], wanted.logits[:, -1:][mask[:, -1] > 0])
        # What is kept serves as well.
        more = random_ids(2, 3, seed=9)
        if inputs:
            inputs = {"attention_mask": torch.cat([mask, torch.ones_like(more)], 1)}
        both = (
            model(more, past_key_values=p.past_key_values, **inputs).logits for p in (found, wanted)
        )
        close(*both)


@torch.no_grad()
def the_kept_keys_are_the_same():
    model = make_model(keep=11)
    ids = random_ids(2, 90)
    alone = LifetimeCache(model.config)
    model(ids, past_key_values=alone)
    cache = context_prefill(model, ids).past_key_values
    assert cache.get_seq_length() == 90
    assert cache.memory() == alone.memory()
    for layer, wanted in zip(cache.layers, alone.layers, strict=True):
        for name in ("k", "v", "score"):
            close(getattr(layer._kept, name), getattr(wanted._kept, name))
        assert torch.equal(layer._kept.order.sort().values, wanted._kept.order.sort().values)
    # In all processes the same bits.
    told = torch.cat([layer._kept.k.flatten() for layer in cache.layers])
    other = told.clone()
    dist.broadcast(other, 0)
    assert torch.equal(told, other)


def generation_goes_on(changes):
    model = make_model(**changes)
    ids = random_ids(2, 60)
    cache = context_prefill(model, ids[:, :-1]).past_key_values
    found = model.generate(ids, past_key_values=cache, **NEW)
    assert torch.equal(found, model.generate(ids, **NEW))


@torch.no_grad()
def in_several_calls(changes):
    model = make_model(**changes)
    ids = random_ids(1, 77)
    alone, together = LifetimeCache(model.config), None
    for part in ids.split(30, 1):
        wanted = model(part, past_key_values=alone).logits[:, -1:]
        found = context_prefill(model, part, past_key_values=together)
        together = found.past_key_values
        close(found.logits, wanted)
    assert together.get_seq_length() == 77


@torch.no_grad()
def ties_go_to_the_earlier_key():
    model = make_model(keep=5)
    for layer in model.model.layers:
        layer.self_attn.score.A.zero_()
    ids = random_ids(2, 30)
    close(context_prefill(model, ids).logits, model(ids).logits[:, -1:])


def the_exchange_has_the_stated_size():
    """``w G (2 d b + 4) B`` bytes a layer, whatever the length."""
    sizes, plain = [], dist.all_gather_into_tensor

    def counting(out, told, **kwargs):
        sizes.append(told.nbytes)
        return plain(out, told, **kwargs)

    model = make_model(keep=8)
    dist.all_gather_into_tensor = counting
    try:
        for length in (40, 200):
            context_prefill(model, random_ids(1, length))
    finally:
        dist.all_gather_into_tensor = plain
    assert sizes == [8 * 2 * (2 * 8 * 8 + 4)] * 6


def half_precision():
    model = make_model(keep=9).bfloat16()
    ids = random_ids(2, 41)
    with torch.no_grad():
        wanted = model(ids).logits[:, -1:]
    found = context_prefill(model, ids)
    assert found.past_key_values.layers[0]._kept.k.dtype == torch.bfloat16
    torch.testing.assert_close(found.logits, wanted, rtol=0.1, atol=0.3)


def mistakes_are_named():
    model = make_model(keep=9)
    ids = random_ids(1, 20)
    with pytest.raises(ValueError, match="differ between processes"):
        context_prefill(model, ids + dist.get_rank())
    with pytest.raises(ValueError, match="differ between processes"):
        context_prefill(model, random_ids(1, 20 + dist.get_rank()))
    with pytest.raises(ValueError, match="1 tokens for 2 processes"):
        context_prefill(model, ids[:, :1])
    with pytest.raises(ValueError, match=r"attention_mask is \[1, 19\] but must be \[1, 20\]"):
        context_prefill(model, ids, attention_mask=torch.ones(1, 19))
    with pytest.raises(ValueError, match="pass LifetimeCache"):
        context_prefill(model, ids, past_key_values=LifetimeCache())
    cache = context_prefill(model, ids).past_key_values
    before = copy.deepcopy(cache.layers[0]._kept.k)
    with pytest.raises(ValueError, match="differ between processes"):
        context_prefill(model, ids * (1 + dist.get_rank()), past_key_values=cache)
    assert cache.get_seq_length() == 20
    assert torch.equal(cache.layers[0]._kept.k, before)


CASES = {
    **{
        f"rows, {keep}{side}": partial(same_rows, changes, sides)
        for keep, changes in KEEPS.items()
        for side, sides in PADDED.items()
    },
    **{f"generate, {keep}": partial(generation_goes_on, c) for keep, c in KEEPS.items()},
    **{f"several calls, {keep}": partial(in_several_calls, c) for keep, c in KEEPS.items()},
    "the kept keys": the_kept_keys_are_the_same,
    "ties": ties_go_to_the_earlier_key,
    "size of the exchange": the_exchange_has_the_stated_size,
    "bfloat16": half_precision,
    "mistakes": mistakes_are_named,
}

if __name__ == "__main__":
    run(CASES, sys.argv[1])
