"""Dense models turned into DMA models."""

from __future__ import annotations

import pytest
import torch
import transformers
from dma_models import SIZES, random_ids

from dynmask.dma import from_pretrained_dense

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = {
    "llama": ("Llama", {}),
    "llama-bias-tied": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 12}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make_dense(kind, **changes):
    family, extra = KINDS[kind]
    torch.manual_seed(0)
    shape = getattr(transformers, f"{family}Config")(
        **{**SIZES, "initializer_range": 0.15, **extra, **changes}
    )
    dense = getattr(transformers, f"{family}ForCausalLM")(shape).eval()
    with torch.no_grad():
        for name, weight in dense.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return dense


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", ["exp", "linear"])
def test_keep_all_gives_the_dense_logits(kind, score):
    dense, ids = make_dense(kind), random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    real = mask.bool()
    expected = logits(dense, ids, attention_mask=mask)[real]
    for keep in (None, 40, [None, 40, 99]):
        model = from_pretrained_dense(dense, keep=keep, score=score)
        for use_cache in (False, True):
            out = logits(model, ids, attention_mask=mask, use_cache=use_cache)[real]
            torch.testing.assert_close(out, expected, **CLOSE)


def test_generates_as_the_dense_model():
    dense, ids = make_dense("qwen3"), random_ids(2, 12)
    model = from_pretrained_dense(dense, keep=None)
    options = {"do_sample": False, "max_new_tokens": 12, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), dense.generate(ids, **options))


def test_without_a_start_for_a_the_earliest_keys_are_kept():
    dense, ids = make_dense("llama"), random_ids(1, 40)
    changed = ids.clone()
    changed[:, 9:39] = random_ids(1, 40, seed=1)[:, 9:39]
    one, other = (
        logits(from_pretrained_dense(dense, keep=9), some)[:, -1] for some in (ids, changed)
    )
    torch.testing.assert_close(one, other, **CLOSE)
    model = from_pretrained_dense(dense, keep=9, a_std=0.02)
    assert (logits(model, ids)[:, -1] - logits(model, changed)[:, -1]).abs().max() > 1e-3


def test_starts_of_the_score():
    dense = make_dense("llama")
    scores = [
        [layer.self_attn.score for layer in from_pretrained_dense(dense, **kwargs).model.layers]
        for kwargs in ({"keep": 9}, {"keep": 9, "a_std": 2.0})
    ]
    assert all((score.A == 0).all() for score in scores[0])
    assert 1 < torch.stack([score.A for score in scores[1]]).std() < 4
    for score in (*scores[0], *scores[1]):
        assert 0.07 < score.dt_proj.weight.std() < 0.3


def test_learns_from_there():
    dense, ids = make_dense("llama"), random_ids(2, 40)
    model = from_pretrained_dense(dense, keep=9).train()
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        assert (layer.self_attn.score.A.grad != 0).all()


def test_from_a_folder(tmp_path):
    dense, ids = make_dense("qwen3").bfloat16(), random_ids(2, 30)
    dense.generation_config.repetition_penalty = 1.3
    dense.save_pretrained(tmp_path)
    model = from_pretrained_dense(str(tmp_path), keep=8)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.repetition_penalty == 1.3
    model.save_pretrained(tmp_path / "dma")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dma")
    assert again.config.keep == 8
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("window", [40, 8])
def test_a_window_is_dropped_with_a_word(window, caplog):
    dense, ids = make_dense("mistral", sliding_window=window), random_ids(2, 40)
    model = from_pretrained_dense(dense, keep=None)
    assert f"sliding window of {window} tokens is dropped" in caplog.text
    same = (logits(model, ids) - logits(dense, ids)).abs().amax(-1) < 1e-4
    assert same[:, :window].all()
    assert not same[:, window:].any()


@pytest.mark.parametrize(
    ("family", "changes", "options", "message"),
    [
        ("Gemma", {}, {}, '"gemma" models cannot be converted'),
        ("Llama", {}, {"keep": 0}, "keep=0"),
        ("Llama", {}, {"keep": [4]}, "1 entries for 3 layers"),
        ("Llama", {}, {"score": "softmax"}, "score='softmax'"),
        ("Llama", {}, {"a_std": -1.0}, "a_std=-1.0"),
    ],
    ids=["gemma", "keep", "keep-by-layer", "score", "a_std"],
)
def test_bad_input(family, changes, options, message):
    shape = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(shape)
    with pytest.raises(ValueError, match=message):
        from_pretrained_dense(model, **{"keep": 4, **options})


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*absent"):
        from_pretrained_dense(tmp_path / "absent", keep=4)
