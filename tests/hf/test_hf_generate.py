"""Generation under a plan."""

from __future__ import annotations

import pytest
import torch
from hf_models import make_model, make_plan, random_ids

from dynmask.hf import accelerate

NEW = 5
# Layers alike, and layers of two kinds with a cache each; the others differ in nothing here.
pytestmark = pytest.mark.parametrize("kind", ["llama", "gemma3"])


def generate(model, ids, mask=None, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    torch.manual_seed(0)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, **kwargs)
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("mode", ["static", "auto", "dense"])
def test_left_padded_batch_equals_one_by_one(kind, mode):
    model = make_model(kind)
    lengths = (17, 3, 24)
    ids = random_ids(3, 24)
    mask = torch.stack([(torch.arange(24) >= 24 - n).long() for n in lengths])
    with accelerate(model, make_plan(model), mode=mode):
        together = generate(model, ids * mask, mask, do_sample=False)
        for row, length in enumerate(lengths):
            alone = generate(model, ids[row : row + 1, 24 - length :], do_sample=False)
            assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=["greedy", "sample", "beam", "static-cache"],
)
def test_dense_mode_generates_what_the_model_does(kind, how):
    model = make_model(kind)
    ids = random_ids(2, 19)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    expected = generate(model, ids * mask, mask, **how)
    with accelerate(model, make_plan(model), mode="dense"):
        assert torch.equal(generate(model, ids * mask, mask, **how), expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_static_cache_equals_dynamic_cache(kind, beams):
    model = make_model(kind)
    ids = random_ids(2, 19)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    how = {"do_sample": False, "num_beams": beams}
    with accelerate(model, make_plan(model), mode="static") as run:
        dynamic = generate(model, ids * mask, mask, **how)
        static = generate(model, ids * mask, mask, cache_implementation="static", **how)
    assert torch.equal(dynamic, static)
    assert run.stats()["calls"]["decode"] >= 2 * 3 * (NEW - 1)


def test_beam_search_equals_beam_search_without_cache(kind):
    model = make_model(kind)
    ids = random_ids(2, 15)
    how = {"do_sample": False, "num_beams": 3}
    with accelerate(model, make_plan(model), mode="static"):
        cached = generate(model, ids, **how)
        assert torch.equal(generate(model, ids, use_cache=False, **how), cached)


def test_prompt_lookup_equals_greedy(kind):
    model = make_model(kind)
    ids = random_ids(1, 12).repeat(1, 2)
    with accelerate(model, make_plan(model), mode="static") as run:
        expected = generate(model, ids, do_sample=False)
        found = generate(model, ids, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)
    assert run.stats()["calls"].get("chunk", 0) > 0


def test_left_padded_beams_equal_one_by_one(kind):
    model = make_model(kind)
    lengths = (17, 24)
    ids = random_ids(2, 24)
    mask = torch.stack([(torch.arange(24) >= 24 - n).long() for n in lengths])
    how = {"do_sample": False, "num_beams": 3}
    with accelerate(model, make_plan(model), mode="static"):
        together = generate(model, ids * mask, mask, **how)
        for row, length in enumerate(lengths):
            alone = generate(model, ids[row : row + 1, 24 - length :], **how)
            assert torch.equal(alone[0], together[row])
