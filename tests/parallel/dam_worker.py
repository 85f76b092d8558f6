"""Accelerated models of transformers under tensor parallelism, beside themselves in one process."""

import sys
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import hf_models
import pytest
import torch
from hf_models import make_plan
from parallel_cases import mean_of_all, run
from torch import distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from dynmask import accelerate, calibrate
from dynmask.baselines import H2O, TopK
from dynmask.dam import Dynamic

LENGTH = 150
NEW = {"min_new_tokens": 12, "max_new_tokens": 12, "do_sample": False}
SHORT = Dynamic(coverage=0.8, tile=16, block=16, near=8, landmarks=8, shortest=64)


@cache
def pair(kind):
    """The model split, and whole; in float64, so that rounding cannot hide a wrong head."""
    folder = Path(sys.argv[2]) / kind
    how = {"dtype": torch.float64}
    config = DistributedConfig(tp_plan="auto")
    split = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, **how)
    return split.eval(), AutoModelForCausalLM.from_pretrained(folder, **how).eval()


def random_ids(batch, length, *, seed=0):
    """Of an even vocabulary: older transformers split no other."""
    return hf_models.random_ids(batch, length, seed=seed).clamp_max(95)


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(ids, **inputs).logits


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def the_heads_are_split():
    split, whole = pair("llama")
    here, all_of_it = (m.model.layers[0].self_attn.q_proj.weight for m in (split, whole))
    assert here.to_local().shape[0] * 2 == all_of_it.shape[0]


def same_output(kind, *, planned=True, **how):
    """Under the plan, the layers' masks follow the heads, and what is counted is each one's own."""
    split, whole = pair(kind)
    plan = make_plan(whole) if planned else None
    ids = random_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    found, stats = [], []
    for model in (split, whole):
        with accelerate(model, plan, **how) as run:
            found += [logits(model, ids), logits(model, ids, attention_mask=mask)[1:]]
            stats.append(run.stats())
        found += [logits(model, ids)]
    for one, other in zip(found[:3], found[3:], strict=True):
        close(one, other)
    assert not torch.allclose(found[0], found[2], atol=1e-3), "nothing was left out"
    here, there = (s["density"]["prefill"] for s in stats)
    assert mean_of_all(here) == pytest.approx(there, rel=1e-9)
    if planned:
        assert mean_of_all(here != there) == 1, "each process counts its heads alone"


def same_tokens(kind, *, capped=False):
    split, whole = pair(kind)
    plan = make_plan(whole)
    ids = random_ids(1, 150)
    found = []
    for model in (split, whole):
        with accelerate(model, plan) as run:
            past = {"past_key_values": run.cache(140)} if capped else {}
            found.append(model.generate(ids, **NEW, **past))
    assert found[0].shape[1] == 162
    assert torch.equal(*found)


@torch.no_grad()
def same_slots():
    """Every process keeps the same tokens, those that the heads of any of them look at."""
    split, whole = pair("llama")
    ids = random_ids(2, 150)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    kept = []
    for model in (split, whole):
        with accelerate(model) as run:
            cache = run.cache(140)
            model(ids, attention_mask=mask, past_key_values=cache)
            kept.append([layer.keys for layer in cache.layers])
    for here, all_of_it in zip(*kept, strict=True):
        assert here.shape[2] < 140
        close(here, all_of_it.chunk(2, dim=1)[dist.get_rank()])


def same_choice(policy):
    split, whole = pair("llama")
    ids = random_ids(1, LENGTH)
    found = []
    for model in (split, whole):
        with accelerate(model, policy=policy):
            found.append(logits(model, ids))
    close(*found)


def another_models_plan_is_refused():
    split, _ = pair("llama")
    _, other = pair("qwen3")
    with pytest.raises(ValueError, match="made for another model"):
        accelerate(split, make_plan(other))


def calibration_is_refused(*, at_once):
    """Before anything runs; and should nothing tell that the heads are split, behind a layer."""
    split, _ = pair("llama")
    texts = [random_ids(1, 300, seed=s)[0].tolist() for s in range(3)]
    ran = []
    hook = split.register_forward_pre_hook(lambda *_: ran.append(1))
    told = "split over 2 processes" if at_once else "of which this process computes 2"
    with ExitStack() as stack:
        stack.callback(hook.remove)
        if not at_once:
            stack.enter_context(patch("dynmask.hf.calibration.refuse_split"))
        with pytest.raises(ValueError, match=f"{told}.*: calibrate the model without a tp_plan"):
            calibrate(split, None, texts, capture_length=32, coverage_length=64, holdout=0.3)
    assert bool(ran) is not at_once


CASES = {
    "the heads are split": the_heads_are_split,
    **{
        f"{mode}, {kind}": partial(same_output, kind, mode=mode)
        for kind, mode in (
            ("llama", "static"),
            ("llama", "auto"),
            ("llama-mha", "static"),
            ("qwen3", "auto"),
        )
    },
    "dynamic heads beside static ones": partial(same_output, "llama-mha", dynamic=SHORT),
    "dynamic": partial(same_output, "llama", planned=False, dynamic=SHORT),
    "generate, llama": partial(same_tokens, "llama"),
    "generate, qwen3": partial(same_tokens, "qwen3"),
    "generate, capped": partial(same_tokens, "llama", capped=True),
    "capped": same_slots,
    "H2O": partial(same_choice, H2O()),
    "TopK": partial(same_choice, TopK()),
    "another plan": another_models_plan_is_refused,
    "calibrate": partial(calibration_is_refused, at_once=True),
    "calibrate, unseen": partial(calibration_is_refused, at_once=False),
}

if __name__ == "__main__":
    run(CASES, sys.argv[1])
