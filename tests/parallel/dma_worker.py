"""DMA models under tensor parallelism, beside themselves in one process, in float64."""

import sys
from functools import cache, partial
from pathlib import Path

import dma_models
import pytest
import torch
from parallel_cases import run
from torch import distributed as dist
from transformers.distributed import DistributedConfig

from dynmask.dma import DmaForCausalLM, LifetimeCache

NEW = {"min_new_tokens": 15, "max_new_tokens": 15, "do_sample": False}


def random_ids(batch, length, *, seed=0):
    """Of an even vocabulary: older transformers split no other."""
    return dma_models.random_ids(batch, length, seed=seed).clamp_max(95)


def split(name):
    folder, config = Path(sys.argv[2]) / name, DistributedConfig(tp_plan="auto")
    how = {"dtype": torch.float64, "distributed_config": config}
    return DmaForCausalLM.from_pretrained(folder, **how).eval()


@cache
def pair(name):
    """The model split, and whole."""
    folder = Path(sys.argv[2]) / name
    return split(name), DmaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def heads_and_scores_are_split():
    here, whole = (model.model.layers[0].self_attn for model in pair("plain"))
    for module in ("q_proj", "k_proj", "v_proj", "score.dt_proj"):
        weights = [attention.get_submodule(module).weight for attention in (here, whole)]
        assert weights[0].to_local().numel() * 2 == weights[1].numel(), module
    assert len(here.score.A.to_local()) == 1
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(2, 2, 9, 8, dtype=torch.float64, generator=draw)
    rank = dist.get_rank()
    score = here.score(values[:, rank : rank + 1])
    close(score, whole.score(values)[:, rank : rank + 1])


@torch.no_grad()
def same_output(name):
    here, whole = pair(name)
    ids = random_ids(2, 61)
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    for inputs in ({}, {"attention_mask": mask}):
        found, wanted = (m(ids, **inputs).logits for m in (here, whole))
        close(found[0], wanted[0])
        close(found[1, 8:], wanted[1, 8:])


def same_tokens(name):
    here, whole = pair(name)
    ids = random_ids(2, 40)
    assert torch.equal(*(m.generate(ids, **NEW) for m in (here, whole)))


@torch.no_grad()
def each_holds_its_heads_keys():
    sizes = []
    for model in pair("plain"):
        cache = LifetimeCache(model.config)
        model(random_ids(1, 40), past_key_values=cache)
        sizes.append(cache.memory())
    assert sizes[0] * 2 == sizes[1]


def same_gradients(name):
    here, whole = pair(name)
    ids = random_ids(2, 50)
    grads = []
    for model in (here, whole):
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append({name: full(weight.grad) for name, weight in model.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for parameter, wanted in grads[1].items():
        assert wanted.abs().max() > 0, parameter
        assert torch.allclose(grads[0][parameter], wanted, rtol=1e-7, atol=1e-9), parameter


def saved_is_the_whole_model():
    here, whole = pair("plain")
    folder = Path(sys.argv[2]) / "saved"
    here.save_pretrained(folder)
    dist.barrier()
    again = DmaForCausalLM.from_pretrained(folder, dtype=torch.float64).state_dict()
    for name, weight in whole.state_dict().items():
        assert torch.equal(again[name], weight), name


def one_kv_head_is_refused():
    with pytest.raises(ValueError, match="num_key_value_heads=1 cannot be split over 2 processes"):
        split("one")


CASES = {
    "heads and scores are split": heads_and_scores_are_split,
    **{f"output, {name}": partial(same_output, name) for name in ("plain", "other")},
    **{f"generate, {name}": partial(same_tokens, name) for name in ("plain", "other")},
    **{f"gradients, {name}": partial(same_gradients, name) for name in ("plain", "other")},
    "the cache": each_holds_its_heads_keys,
    "save": saved_is_the_whole_model,
    "one kv head": one_kv_head_is_refused,
}

if __name__ == "__main__":
    run(CASES, sys.argv[1])
