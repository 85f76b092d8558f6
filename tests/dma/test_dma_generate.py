"""Generation with the bounded cache against recomputing everything at each step."""

from __future__ import annotations

import pytest
import torch
from dma_models import make_model, random_ids
from features import lacks_compile, needs
from transformers import DynamicCache, StaticCache

from dynmask.dma import LifetimeCache

NEW = 9
RULES = [
    pytest.param({"keep": 5}, id="keep"),
    pytest.param({"keep": 60}, id="keep-more"),
    pytest.param({"keep": None, "threshold": 0.9}, id="threshold"),
    pytest.param({"keep": [4, None, 9], "threshold": 0.5}, id="by-layer"),
]
each_rule = pytest.mark.parametrize("rule", RULES)


def generate(model, ids, mask=None, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    torch.manual_seed(0)
    fixed = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=mask, **{"do_sample": False, **fixed, **kwargs})
    return out if isinstance(out, dict) else out[:, ids.shape[1] :]


@torch.no_grad()
def greedy(model, ids):
    """One text ``[N]``, all of it computed anew for every token."""
    for _ in range(NEW):
        logits = model(ids[None], use_cache=False).logits[0, -1]
        logits[2] = -torch.inf  # min_new_tokens rules the end out.
        ids = torch.cat([ids, logits.argmax()[None]])
    return ids[-NEW:]


@each_rule
def test_greedy(rule):
    model, ids = make_model(**rule), random_ids(2, 30)
    expected = torch.stack([greedy(model, row) for row in ids])
    assert torch.equal(generate(model, ids), expected)
    assert torch.equal(generate(model, ids, use_cache=False), expected)
    assert torch.equal(generate(model, ids, prefill_chunk_size=7), expected)
    assert torch.equal(generate(model, ids, past_key_values=LifetimeCache()), expected)


@each_rule
def test_left_padded_batch(rule):
    model = make_model(**rule)
    texts = [random_ids(1, n, seed=n)[0] for n in (30, 3, 17)]
    ids, mask = torch.zeros(3, 30, dtype=torch.long), torch.zeros(3, 30, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, 30 - len(text) :], mask[row, 30 - len(text) :] = text, 1
    expected = torch.stack([greedy(model, text) for text in texts])
    assert torch.equal(generate(model, ids, mask), expected)
    assert torch.equal(generate(model, ids, mask, prefill_chunk_size=7), expected)
    assert torch.equal(generate(model, ids, mask, use_cache=False), expected)


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2, "top_k": 7},
        {"repetition_penalty": 1.3},
    ],
    ids=["beams", "beams-returned", "sample", "beam-sample", "penalty"],
)
@pytest.mark.parametrize("keep", [5, None])
def test_other_modes(mode, keep):
    model, ids = make_model(keep=keep), random_ids(2, 21)
    assert torch.equal(generate(model, ids, **mode), generate(model, ids, use_cache=False, **mode))


@pytest.mark.parametrize("keep", [5, None])
@pytest.mark.parametrize("helper", ["prompt-lookup", "other-model", "itself"])
def test_assisted(helper, keep):
    model, ids = make_model(keep=keep), random_ids(1, 21)
    options = {
        "prompt-lookup": {"prompt_lookup_num_tokens": 3},
        "other-model": {"assistant_model": make_model(seed=1, keep=keep)},
        "itself": {"assistant_model": make_model(keep=keep)},
    }
    assert torch.equal(generate(model, ids, **options[helper]), greedy(model, ids[0])[None])


def test_returned_cache_goes_on():
    model, ids = make_model(keep=5), random_ids(2, 30)
    out = generate(model, ids[:, :20], return_dict_in_generate=True, output_logits=True)
    cache, text = out.past_key_values, out.sequences
    assert isinstance(cache, LifetimeCache)
    assert cache.get_seq_length() == 20 + NEW - 1
    assert len(out.logits) == NEW
    more = torch.cat([text, ids[:, 20:]], 1)
    expected = torch.stack([greedy(model, row) for row in more])
    assert torch.equal(generate(model, more, past_key_values=cache), expected)


def test_memory_does_not_grow():
    model = make_model(keep=5)
    sizes = []
    for length in (6, 60):
        cache = LifetimeCache()
        generate(model, random_ids(1, length), past_key_values=cache)
        sizes.append(cache.memory())
    assert sizes[0] == sizes[1] > 0


def test_a_share_of_the_length_is_that_of_the_first_call():
    shared, ids = make_model(keep=0.25), random_ids(2, 33)
    assert torch.equal(generate(shared, ids), generate(make_model(keep=9), ids))


def test_a_share_of_the_length_is_not_that_of_a_chunk():
    model, ids = make_model(keep=0.25), random_ids(2, 33)
    for options in ({}, {"past_key_values": LifetimeCache()}):
        with pytest.raises(ValueError, match=r"keep=0.25 is a share .* leave prefill_chunk_size"):
            generate(model, ids, prefill_chunk_size=8, **options)


@pytest.mark.parametrize(
    "helper",
    [
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": make_model(seed=1)},
        {"assistant_early_exit": 1},
    ],
    ids=["prompt-lookup", "other-model", "early-exit"],
)
def test_a_share_of_the_length_is_not_that_of_candidates(helper):
    model, ids = make_model(keep=0.25), random_ids(1, 33)
    for options in ({}, {"past_key_values": LifetimeCache()}):
        with pytest.raises(ValueError, match=r"keep=0.25 is a share .* leave assistant_model"):
            generate(model, ids, **helper, **options)


@torch.no_grad()
@each_rule
@pytest.mark.parametrize("padding", [0, 6], ids=["whole", "padded"])
def test_steps_equal_one_pass(rule, padding):
    model, ids = make_model(**rule), random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    cache, parts, at = LifetimeCache(), [], 0
    for size in (11, 1, 1, 7, 1, 19):
        so_far = mask[:, : at + size] if padding else None
        part = model(ids[:, at : at + size], attention_mask=so_far, past_key_values=cache)
        parts.append(part.logits)
        at += size
    for b in (0, 1):
        real = mask[b].bool()
        torch.testing.assert_close(
            torch.cat(parts, 1)[b][real], whole[b][real], atol=1e-4, rtol=1e-4
        )


@pytest.fixture(scope="module")
def compiled():
    """A model whose forward pass is compiled; a real backend would take half a minute."""
    needs(lacks_compile)
    torch.compiler.reset()
    model = make_model(num_hidden_layers=1)
    model.forward = torch.compile(model.forward, backend="eager")
    yield model
    torch.compiler.reset()


@torch.no_grad()
def test_compiled_model_takes_chunks(compiled):
    ids = random_ids(2, 100)
    caches = LifetimeCache(), LifetimeCache()
    eager = make_model(num_hidden_layers=1)
    for part in ids.split([50, 1, 1, 1, 1, 1, 1, 44], dim=1):
        got, expected = (
            model(part, past_key_values=cache).logits
            for model, cache in zip((compiled, eager), caches, strict=True)
        )
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "quantized"},
        {"past_key_values": DynamicCache()},
    ],
    ids=str,
)
def test_other_caches_are_refused(options):
    with pytest.raises(ValueError, match="LifetimeCache"):
        generate(make_model(), random_ids(1, 9), **options)


def test_static_cache_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="StaticCache has no place"):
        generate(model, random_ids(1, 9), past_key_values=StaticCache(model.config, 30))


@torch.no_grad()
def test_cache_of_another_batch_or_model_is_refused():
    cache = LifetimeCache()
    make_model()(random_ids(2, 9), past_key_values=cache)
    for model, rows in ((make_model(), 3), (make_model(num_key_value_heads=4), 2)):
        with pytest.raises(ValueError, match="LifetimeCache"):
            model(random_ids(rows, 1), past_key_values=cache)
    other = make_model(keep=9)
    with pytest.raises(ValueError, match="keep=9"):
        other(random_ids(2, 1), past_key_values=cache)
