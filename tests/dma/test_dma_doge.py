"""Parity with transformers' Doge in eager attention, whose authors are DMA's."""

from __future__ import annotations

import pytest
import torch
from dma_models import SIZES, random_ids
from transformers import DogeConfig, DogeForCausalLM, DogeModel

from dynmask.dma import LifetimeCache, from_doge, from_pretrained_dense

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
KEEP = 7


def make_doge(**changes):
    torch.manual_seed(0)
    shape = DogeConfig(**{**SIZES, "keep_window_size": KEEP, **changes})
    doge = DogeForCausalLM._from_config(shape, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in doge.named_parameters():
            if name.endswith(".A"):
                weight.normal_()
            if "residual" in name or "norm" in name:
                weight.uniform_(0.5, 1.5)
    return doge


@pytest.fixture
def stable_topk(monkeypatch):
    """Let Doge's ``topk`` keep the earlier of equal scores: torch leaves open which it is."""

    def topk(x, k, dim, largest, sorted):
        assert largest
        order = x.sort(dim=dim, descending=True, stable=True)
        return type(order)((order.values[..., :k], order.indices[..., :k]))

    monkeypatch.setattr(torch, "topk", topk)


def padded(length):
    mask = torch.ones(3, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    mask[1, length - length // 4 :] = 0
    return mask


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "mlp_bias": True}], ids=str)
@pytest.mark.parametrize("length", [1, KEEP, KEEP + 1, 50])
@pytest.mark.parametrize("with_padding", [False, True], ids=["whole", "padded"])
def test_prefill(changes, length, with_padding):
    doge = make_doge(**changes)
    model, ids = from_doge(doge), random_ids(3, length)
    mask = padded(length) if with_padding else torch.ones_like(ids)
    expected = doge(ids, attention_mask=mask).logits[mask.bool()]
    for use_cache in (False, True):
        out = model(ids, attention_mask=mask, use_cache=use_cache).logits
        torch.testing.assert_close(out[mask.bool()], expected, **CLOSE)


@torch.no_grad()
def test_prefill_with_equal_scores(stable_topk):
    # In the first layer a token's score is that of its kind: text that repeats tokens ties there.
    doge, ids = make_doge(), random_ids(2, 50) % 9 + 3
    torch.testing.assert_close(from_doge(doge)(ids).logits, doge(ids).logits, **CLOSE)


@torch.no_grad()
def test_up_to_the_window_equal_scores_do_not_matter():
    doge, ids = make_doge(), random_ids(2, KEEP) % 3 + 3
    torch.testing.assert_close(from_doge(doge)(ids).logits, doge(ids).logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("with_padding", [False, True], ids=["whole", "left-padded"])
def test_token_by_token(with_padding):
    doge = make_doge()
    model, ids = from_doge(doge), random_ids(2, 40)
    mask = torch.ones_like(ids)
    if with_padding:
        mask[0, :9] = 0
    ours, theirs, first = LifetimeCache(), None, 12
    for start, end in [(0, first), *((i, i + 1) for i in range(first, 40))]:
        step = {"attention_mask": mask[:, :end]}
        expected = doge(ids[:, start:end], past_key_values=theirs, use_cache=True, **step)
        theirs = expected.past_key_values
        out = model(ids[:, start:end], past_key_values=ours, **step).logits
        real = mask[:, start:end].bool()
        torch.testing.assert_close(out[real], expected.logits[real], **CLOSE)


@pytest.mark.parametrize("length", [3, 30])
def test_greedy_tokens(length, stable_topk):
    doge = make_doge()
    # No token twice: the scores of two are equal but for rounding, which depends on the processor.
    ids = torch.stack([torch.randperm(90)[:length] + 3 for _ in range(3)])
    model = from_doge(doge)
    mask = padded(length).flip(1)
    mask[0] = 1
    options = {
        "attention_mask": mask,
        "do_sample": False,
        "max_new_tokens": 20,
        "no_repeat_ngram_size": 1,
        "pad_token_id": 0,
    }
    expected = doge.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    assert len(expected[:, length:].unique()) > 5


def test_from_a_folder(tmp_path):
    doge, ids = make_doge().bfloat16(), random_ids(2, 30)
    doge.save_pretrained(tmp_path)
    model = from_doge(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2
    assert torch.equal(model(ids).logits, from_doge(doge)(ids).logits)


def test_shares_nothing_with_the_model_given():
    doge, ids = make_doge(), random_ids(2, 30)
    before = doge(ids).logits
    model = from_doge(doge.train())
    assert model.training
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(doge.eval()(ids).logits, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2}, "is_moe=True"),
        ({"sliding_window": 8}, "sliding_window=8"),
        ({"attention_bias": True}, "attention_bias=True"),
    ],
    ids=["experts", "window", "bias"],
)
def test_what_cannot_be_taken(changes, message):
    with pytest.raises(ValueError, match=message):
        from_doge(make_doge(**changes))


def test_wrong_models():
    with pytest.raises(ValueError, match="no language modeling head"):
        from_doge(DogeModel(make_doge().config))
    with pytest.raises(ValueError, match='"dma" is no Doge model'):
        from_doge(from_doge(make_doge()))
    with pytest.raises(ValueError, match="use from_doge"):
        from_pretrained_dense(make_doge(), keep=4)


def test_dropout_is_named(caplog):
    from_doge(make_doge(hidden_dropout=0.1))
    assert "hidden_dropout=0.1 is dropped" in caplog.text
