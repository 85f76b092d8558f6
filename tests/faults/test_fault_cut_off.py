"""A call that is cut off leaves layers of a cache with different tokens: the next one says so."""

from __future__ import annotations

import pytest
import torch
from fault_models import make_model, random_ids, tokens
from transformers import DynamicCache

from dynmask.hf import accelerate

MEMORY = torch.OutOfMemoryError("CUDA out of memory")


def cut_off(model, part, **inputs):
    """Run a forward pass that ends before a module of the second layer."""

    def fail(*given):
        raise MEMORY

    hook = model.get_submodule(f"model.layers.1.{part}").register_forward_pre_hook(fail)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            model(**inputs)
    finally:
        hook.remove()


PARTS = ["input_layernorm", "self_attn.o_proj", "mlp"]
each_part = pytest.mark.parametrize("part", PARTS)


@each_part
@pytest.mark.parametrize("before", [0, 20, 300], ids=["prefill", "chunk", "after evicting"])
@pytest.mark.parametrize("mode", ["static", "dense"])
def test_capped_cache_is_not_gone_on_with(plan, part, before, mode):
    model = make_model()
    with accelerate(model, plan, mode=mode) as run, torch.no_grad():
        expected = tokens(model, length=200, past_key_values=run.cache(136))
        cache = run.cache(136)
        if before:
            model(random_ids(before), past_key_values=cache)
        cut_off(model, part, input_ids=random_ids(9), past_key_values=cache)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"cut off \(out of memory.*run\.cache\(\)"):
                model(random_ids(1), past_key_values=cache)
        # A new one works, and so does this one once it is emptied.
        again = tokens(model, length=200, past_key_values=run.cache(136))
        cache.reset()
        emptied = tokens(model, length=200, past_key_values=cache)
    assert torch.equal(again, expected)
    assert torch.equal(emptied, expected)


@each_part
@pytest.mark.parametrize("mode", ["static", "dense"])
def test_ordinary_cache_is_not_gone_on_with(plan, part, mode):
    model = make_model()
    with accelerate(model, plan, mode=mode), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(random_ids(20), past_key_values=cache)
        cut_off(model, part, input_ids=random_ids(9), past_key_values=cache)
        with pytest.raises(ValueError, match="cut off"):
            model(random_ids(1), past_key_values=cache)
