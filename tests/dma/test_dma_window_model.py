"""Layers and models with a window: against the paper's layer, its gradients and sliding windows."""

from __future__ import annotations

import pytest
import torch
from dma_models import hidden, make_layer, make_model, paper_layer, random_ids
from features import lacks_compile, needs
from transformers import MistralConfig, MistralForCausalLM

from dynmask.dma import LifetimeCache, from_pretrained_dense

F64 = torch.float64


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


RULES = {
    "some": {"keep": 7, "window": 3},
    "one": {"keep": 7, "window": 1},
    "all": {"keep": 7, "window": 7},
    "threshold": {"keep": 7, "window": 3, "threshold": 0.7},
    "threshold only": {"keep": None, "window": 3, "threshold": 0.7},
    "linear": {"keep": 7, "window": 3, "score": "linear"},
}


@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
@pytest.mark.parametrize("length", [1, 7, 8, 33])
def test_equals_the_definition(options, length):
    layer = make_layer(**options, dtype=F64)
    x = hidden(1, length, dtype=F64)
    rule = {name: options.get(name) for name in ("window", "threshold")}
    expected = paper_layer(layer, x[0], keep=layer.config.keep or length, **rule)
    close(layer(x)[0], expected, 1e-9 if rule["threshold"] is None else 1e-6)


@pytest.mark.parametrize(("length", "keep"), [(40, 12), (10, 3)], ids=["room", "no room"])
def test_of_a_share_no_more_is_near_than_it_gives(length, keep):
    layer = make_layer(keep=0.3, window=5, dtype=F64)
    x = hidden(1, length, dtype=F64)
    close(layer(x)[0], paper_layer(layer, x[0], keep=keep, window=min(5, keep)), 1e-9)


def test_window_by_layer():
    x = hidden(1, 20)
    for index, keep in enumerate([3, 20, 7]):
        layer = make_layer(keep=[3, None, 7], window=3, num_hidden_layers=3)
        layer.layer_idx = index
        close(layer(x)[0], paper_layer(layer, x[0], keep=keep, window=3))


@pytest.mark.parametrize("rule", ["some", "all", "threshold"])
def test_gradients_are_those_of_the_definition(rule):
    options = RULES[rule]
    layer = make_layer(**options, dtype=F64)
    x = hidden(1, 23, dtype=F64).requires_grad_()
    leaves = [x, *layer.parameters()]
    weight = hidden(1, 23, seed=1, dtype=F64)
    rule = {name: options.get(name) for name in ("keep", "window", "threshold")}
    ours = torch.autograd.grad((layer(x) * weight).sum(), leaves)
    dense = torch.autograd.grad((paper_layer(layer, x[0], **rule) * weight[0]).sum(), leaves)
    for a, b in zip(ours, dense, strict=True):
        assert b.abs().max() > 1e-6
        close(a, b, 1e-6)


@torch.no_grad()
def test_a_window_of_all_keys_is_a_sliding_window():
    """Transformers' Mistral, whose window counts a row's own key too."""
    torch.manual_seed(0)
    shape = MistralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    dense = MistralForCausalLM(shape).eval()
    model = from_pretrained_dense(dense, keep=5)
    model.config.window = 5
    ids = random_ids(2, 40)
    close(model(ids).logits, dense(ids, use_cache=False).logits, 1e-4)
    new = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **new), dense.generate(ids, **new))


@pytest.mark.parametrize("rule", ["some", "all", "threshold"])
def test_future_tokens_never_change_the_past(rule):
    layer, x = make_layer(**RULES[rule]), hidden(2, 40)
    whole = layer(x)
    for end in (1, 3, 7, 8, 23):
        changed = x.clone()
        changed[:, end:] = 10 * hidden(2, 40 - end, seed=1)
        close(layer(changed)[:, :end], whole[:, :end])
        close(layer(x[:, :end]), whole[:, :end])


@torch.no_grad()
@pytest.mark.parametrize("rule", ["some", "all", "threshold"])
def test_padding_changes_nothing_wherever_it_is(rule):
    model, ids = make_model(**RULES[rule]), random_ids(1, 21)
    alone = model(ids).logits[0]
    draw = torch.Generator().manual_seed(5)
    holes = torch.randperm(30, generator=draw)[:21].sort().values
    for places in (torch.arange(21), torch.arange(9, 30), torch.arange(4, 25), holes):
        padded, mask = random_ids(2, 30, seed=2), torch.zeros(2, 30, dtype=torch.long)
        padded[0, places], mask[0, places], mask[1] = ids[0], 1, 1
        out = model(padded, attention_mask=mask).logits
        close(out[0, places], alone, 1e-4)
        close(out[1:], model(padded[1:]).logits, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["some", "all", "threshold"])
def test_packed_equals_one_by_one(rule):
    model, lengths = make_model(**RULES[rule]), [1, 13, 2, 6, 20]
    texts = [random_ids(1, n, seed=n) for n in lengths]
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    out = model(torch.cat(texts, 1), documents=ids, use_cache=False).logits
    for text, part in zip(texts, out.split(lengths, 1), strict=True):
        close(part, model(text).logits, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rule", [*RULES, "share"])
@pytest.mark.parametrize("sizes", [[1] * 40, [17, 1, 1, 1, 20], [9, 9, 22]], ids=str)
def test_steps_and_chunks_give_the_rows_of_one_call(rule, sizes):
    options = RULES.get(rule, {"keep": 0.3, "window": 3})
    model, ids = make_model(**options), random_ids(2, 40)
    if rule == "share":
        # The first call fixes the number of keys.
        model.config.keep = max(1, -(-sizes[0] * 3 // 10))
        model.config.window = min(3, model.config.keep)
    whole = model(ids, use_cache=False).logits
    model.config.keep, model.config.window = options["keep"], options["window"]
    cache = LifetimeCache()
    parts = [model(part, past_key_values=cache).logits for part in ids.split(sizes, 1)]
    close(torch.cat(parts, 1), whole, 1e-4)


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "chunked": {"prefill_chunk_size": 8},
    "sampling of beams": {"num_return_sequences": 2, "num_beams": 2},
}


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("rule", ["some", "all"])
def test_generation_gives_the_tokens_of_no_cache(options, rule):
    model, ids = make_model(**RULES[rule]).double(), random_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    new = {"attention_mask": mask, "max_new_tokens": 15, "do_sample": False, **options}
    expected = model.generate(ids, use_cache=False, **{**new, "prefill_chunk_size": None})
    assert torch.equal(model.generate(ids, **new), expected)


def test_prompt_lookup_gives_the_tokens_of_no_cache():
    model, ids = make_model(**RULES["some"]).double(), random_ids(1, 15).repeat(1, 3)
    new = {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **new)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **new), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_whole(packed):
    needs(lacks_compile)
    layer, x = make_layer(**RULES["threshold"]), hidden(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :5] = 0
    inputs = {"documents": torch.arange(40)[None] // 9} if packed else {"attention_mask": mask}
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    close(compiled(x, **inputs), layer(x, **inputs))


def test_gradient_checkpointing_and_the_loss():
    model, ids = make_model(**RULES["some"]).train(), random_ids(2, 40)
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append([weight.grad.clone() for weight in model.parameters()])
    for a, b in zip(*found, strict=True):
        close(a, b)
