"""The layer against the paper's equations, and what must not change its rows."""

from __future__ import annotations

import math

import pytest
import torch
from dma_models import hidden, make_layer, paper_layer
from features import lacks_compile, needs
from transformers import DynamicCache, StaticCache

from dynmask.dma import DmaConfig, DmaForCausalLM, DynamicMaskAttention, LifetimeCache
from dynmask.dma.score import ValueScore

F64 = {"dtype": torch.float64}


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="exp"),
        pytest.param({"score": "linear"}, id="linear"),
        pytest.param({"qk_norm": False, "attention_bias": True}, id="bias"),
        pytest.param({"num_key_value_heads": 1}, id="one-kv-head"),
        pytest.param({"num_key_value_heads": 4, "head_dim": 6}, id="wide-of-hidden"),
        pytest.param({"threshold": 0.7}, id="threshold"),
        pytest.param({"threshold": 0.7, "keep": None}, id="threshold-only"),
        pytest.param({"keep": None}, id="keep-all"),
    ],
)
@pytest.mark.parametrize("length", [1, 7, 8, 33])
def test_equals_the_paper(options, length):
    layer = make_layer(**options, **F64)
    x = hidden(1, length, **F64)
    keep = layer.config.keep or length
    expected = paper_layer(layer, x[0], keep=keep, threshold=layer.config.threshold)
    close(layer(x)[0], expected, 1e-9 if layer.config.threshold is None else 1e-6)


def test_the_score_is_exp_up_to_148_and_its_tangent_above():
    score = ValueScore(1, 1).double()
    torch.nn.init.ones_(score.dt_proj.weight)
    torch.nn.init.ones_(score.A)
    # softplus(x) is x to nine digits from 20 on.
    exponent = torch.cat([torch.linspace(-20, 20, 81), torch.tensor([88.8, 1e4, 1e9])]).double()
    exponent.requires_grad_()
    found = score(exponent.view(1, 1, -1, 1))[0, 0]
    x = torch.nn.functional.softplus(exponent.detach())
    exact, steep = x <= 5, math.exp(5)
    close(found[exact], x[exact].exp(), 1e-12)
    close(found[~exact], steep * (1 + (x[~exact] - 5)), 1e-9)
    assert (found.diff() > 0).all()
    (slope,) = torch.autograd.grad(found.sum(), exponent)
    assert slope[-1] == steep
    assert score.float()(exponent.detach().float().view(1, 1, -1, 1)).isfinite().all()


def test_share_of_the_length():
    layer = make_layer(keep=0.07, **F64)
    x = hidden(1, 100, **F64)
    close(layer(x)[0], paper_layer(layer, x[0], keep=7), 1e-9)


def test_keep_by_layer():
    x = hidden(1, 20)
    options = {"keep": [3, None, 7], "num_hidden_layers": 3}
    for index, keep in enumerate([3, 20, 7]):
        layer = make_layer(**options)
        layer.layer_idx = index
        close(layer(x)[0], paper_layer(layer, x[0], keep=keep))


def test_equal_scores_keep_the_earlier():
    layer = make_layer(keep=3, **F64)
    torch.nn.init.zeros_(layer.score.A)
    x = hidden(1, 9, **F64)
    changed = x.clone()
    changed[:, 3:8] = 0  # Neither kept nor the last row itself.
    close(layer(x)[:, 8], layer(changed)[:, 8], 0)


def test_keep_larger_than_length_selects_nothing():
    x = hidden(2, 20)
    more, all_ = make_layer(keep=20), make_layer(keep=None)
    close(more(x), all_(x), 0)
    less = make_layer(keep=19)
    assert not torch.equal(less(x)[:, 19:], all_(x)[:, 19:])
    close(less(x)[:, :19], all_(x)[:, :19])


@pytest.mark.parametrize("keep", [5, [5, 5, 5], None])
def test_future_tokens_never_change_the_past(keep):
    layer = make_layer(keep=keep)
    x = hidden(2, 40)
    whole = layer(x)
    for end in (1, 5, 6, 23):
        close(layer(x[:, :end]), whole[:, :end])
        changed = x.clone()
        changed[:, end:] = 10 * hidden(2, 40 - end, seed=1)
        close(layer(changed)[:, :end], whole[:, :end])


@pytest.mark.parametrize("threshold", [None, 0.7])
def test_padding_on_either_side_changes_nothing(threshold):
    layer = make_layer(keep=5, threshold=threshold)
    x, length = hidden(3, 30), 21
    alone = layer(x[:1, :length])
    for start in (0, 4, 9):
        mask = torch.zeros(3, 30, dtype=torch.long)
        padded = 3 * hidden(3, 30, seed=2)
        padded[0, start : start + length] = x[0, :length]
        mask[0, start : start + length] = 1
        mask[1] = 1
        out = layer(padded, attention_mask=mask)
        close(out[:1, start : start + length], alone)
        close(out[1:2], layer(padded[1:2]))
        assert (out[mask == 0] == 0).all()


@pytest.mark.parametrize("threshold", [None, 0.7])
@pytest.mark.parametrize("said_by", ["documents", "positions", "positions-and-mask"])
def test_packed_equals_one_by_one(said_by, threshold):
    layer = make_layer(keep=5, threshold=threshold)
    lengths = [1, 13, 6, 20]
    texts = [hidden(1, n, seed=n) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ids = torch.cat([torch.full((n,), 3 * i) for i, n in enumerate(lengths)])[None]
    packed = torch.cat(texts, 1)
    mask = None
    if said_by == "positions-and-mask":
        pad = torch.zeros(1, 4, dtype=torch.long)
        packed = torch.cat([hidden(1, 4), packed], 1)
        positions = torch.cat([pad + 1, positions], 1)
        mask = torch.cat([pad, torch.ones_like(ids)], 1)
    out = layer(
        packed,
        documents=ids if said_by == "documents" else None,
        position_ids=None if said_by == "documents" else positions,
        attention_mask=mask,
    )
    if mask is not None:
        out = out[:, 4:]
    for text, part in zip(texts, out.split(lengths, 1), strict=True):
        close(part, layer(text))


def test_positions_that_go_on_are_one_document():
    layer = make_layer()
    x = hidden(2, 20)
    close(layer(x, position_ids=torch.arange(50, 70)[None]), layer(x), 1e-4)


def test_bfloat16_scores_are_float32():
    layer = make_layer(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = layer.score(hidden(1, 2000, dtype=torch.bfloat16).view(1, 2, 2000, 16)[..., :8])
    assert score.dtype == torch.float32
    assert len(score.unique()) > 2000
    out = layer(hidden(1, 40, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_starts_as_the_paper_says():
    torch.manual_seed(0)
    shape = DmaConfig(hidden_size=1024, num_attention_heads=128, num_key_value_heads=128)
    layer = DynamicMaskAttention(shape)
    for weight in (layer.score.A, layer.score.dt_proj.weight, layer.q_proj.weight):
        assert 0.017 < weight.std() < 0.023
        assert weight.mean().abs() < 0.006


@pytest.mark.parametrize("a_std", [0.0, 2.0])
@pytest.mark.parametrize("whole", [False, True], ids=["layer", "model"])
def test_where_the_score_starts(a_std, whole):
    """A has its own deviation; all else is as without, also where transformers starts weights."""
    torch.manual_seed(0)
    shape = DmaConfig(
        vocab_size=16,
        hidden_size=256,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=128,
        a_std=a_std,
    )
    layer = (
        DmaForCausalLM(shape).model.layers[0].self_attn if whole else DynamicMaskAttention(shape)
    )
    assert 0.8 * a_std <= layer.score.A.std() <= 1.2 * a_std
    assert 0.017 < layer.score.dt_proj.weight.std() < 0.023


@pytest.mark.parametrize(
    ("options", "documents"),
    [({}, None), ({"threshold": 0.7}, torch.arange(40)[None] // 9)],
    ids=["whole", "threshold-packed"],
)
def test_compiles_whole(options, documents):
    needs(lacks_compile)
    layer, x = make_layer(**options), hidden(2, 40).requires_grad_()
    inputs = {"documents": documents}
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close(compiled(x, **inputs), layer(x, **inputs))
    # The debugging backend above gets SDPA's strides wrong in the backward pass; Inductor does not.
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    gradients = [
        torch.autograd.grad(run(x, **inputs).square().sum(), [x, *layer.parameters()])
        for run in (compiled, layer)
    ]
    for ours, expected in zip(*gradients, strict=True):
        close(ours, expected)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": torch.ones(2, 9)}, r"attention_mask is \[2, 9\] but must be \[2, 10\]"),
        ({"attention_mask": torch.ones(2, 1, 10, 10)}, "not a 4-d mask"),
        ({"position_ids": torch.arange(9)[None]}, "position_ids is"),
        ({"documents": torch.zeros(3, 10, dtype=torch.long)}, "documents is"),
        ({"documents": torch.arange(10).flip(0)[None]}, "fall along K"),
        ({"past_key_values": DynamicCache()}, "LifetimeCache"),
        ({"past_key_values": StaticCache(DmaConfig(), max_cache_len=9)}, "LifetimeCache"),
    ],
)
def test_bad_input(inputs, message):
    with pytest.raises(ValueError, match=message):
        make_layer()(hidden(2, 10), **inputs)


@pytest.mark.parametrize("cache", [None, LifetimeCache()], ids=["whole", "cache"])
def test_no_tokens_are_refused(cache):
    with pytest.raises(ValueError, match=r"is \[2, 0, 32\] and holds no token"):
        make_layer()(hidden(2, 0), past_key_values=cache)
