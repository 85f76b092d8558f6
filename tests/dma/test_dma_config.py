"""The configuration: what it refuses, its sizes, and that it survives a file."""

from __future__ import annotations

import json
import re

import pytest
import torch
from dma_models import config, hidden, make_layer, make_model, random_ids
from transformers import AutoConfig

from dynmask.dma import DmaConfig, DmaForCausalLM, DynamicMaskAttention, LifetimeCache
from dynmask.dma.selection import keep_of, select
from dynmask.masks import Lifetimes


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple"),
        ({"num_key_value_heads": 0}, "num_attention_heads=4 must be a multiple"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size=32 is no multiple"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"keep": 0}, "keep=0 must be at least 1"),
        ({"keep": -4}, "keep=-4 must be at least 1"),
        ({"keep": 1.0}, "between 0 and 1"),
        ({"keep": 0.0}, "between 0 and 1"),
        ({"keep": True}, "keep=True must be an integer"),
        ({"keep": "all"}, "keep='all' must be an integer"),
        ({"keep": [4, 4]}, "2 entries for 3 layers"),
        ({"keep": [4, 4, 0]}, "keep=0 must be at least 1"),
        ({"keep": [4, 4, 0.5]}, "integers or None, got 0.5"),
        ({"threshold": float("nan")}, "threshold=nan must be a finite number"),
        ({"threshold": "high"}, "threshold='high' must be a finite number"),
        ({"window": -1}, "window=-1 must be an integer of at least 0"),
        ({"window": 2.0}, "window=2.0 must be an integer"),
        ({"window": True}, "window=True must be an integer"),
        ({"window": None}, "window=None must be an integer"),
        ({"window": 8}, "window=8 is more than keep=7"),
        ({"window": 4, "keep": [9, None, 3]}, "window=4 is more than keep=3"),
        ({"score": "softmax"}, "score='softmax' is not known: use one of"),
        ({"a_std": -1.0}, "a_std=-1.0 must be a finite number of at least 0"),
        ({"a_std": float("nan")}, "a_std=nan must be"),
        ({"impl": "fast"}, "impl='fast' is not known: use one of"),
        ({"vocab_size": -1}, "vocab_size=-1 must be at least 1"),
        ({"hidden_act": "sliu"}, "hidden_act='sliu' is not known: use one of"),
        ({"kep": 8}, "kep is no argument of DmaConfig: write keep"),
        ({"norm_eps": 1e-5}, "norm_eps is no argument of DmaConfig: write rms_norm_eps"),
    ],
)
def test_refuses(bad, message):
    with pytest.raises(ValueError, match=message):
        config(**bad)


def test_names_of_transformers_and_others_pass():
    others = {"sep_token_id": 3, "num_labels": 3, "rope_theta": 5e5, "attention_dropout": 0.0}
    assert config(**others, note="mine").note == "mine"


@pytest.mark.parametrize(
    "changes",
    [
        {"keep": None, "threshold": 0.5},
        {"keep": [9, None, 4], "window": 4},
        {"keep": [3, None, 5], "score": "linear", "a_std": 0.5, "tie_word_embeddings": False},
        {"keep": 0.25, "residual_weights": True, "qk_norm": False},
        {"num_key_value_heads": None, "head_dim": 10, "impl": "reference"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0}},
    ],
)
def test_survives_a_file(changes, tmp_path):
    saved = config(**changes)
    saved.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DmaConfig
    differ = {"_name_or_path", "transformers_version"}
    assert {k: v for k, v in loaded.to_dict().items() if k not in differ} == {
        k: v for k, v in saved.to_dict().items() if k not in differ
    }


def test_fills_in_what_follows():
    shape = DmaConfig(hidden_size=64, num_attention_heads=4)
    assert (shape.num_key_value_heads, shape.head_dim) == (4, 16)
    assert shape.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("name", "millions", "without_embeddings"),
    [("80M", 110, 85), ("200M", 235, 201), ("680M", 730, 680), ("1.7B", 1721, 1410)],
)
def test_named_sizes(name, millions, without_embeddings):
    with torch.device("meta"):
        model = DmaForCausalLM(DmaConfig.named(name))
    count = model.num_parameters() / 1e6
    embedding = model.get_input_embeddings().weight.numel() / 1e6
    assert round(count) == millions
    assert round(count - embedding) == without_embeddings


def test_named_sizes_may_be_changed():
    shape = DmaConfig.named("1.7B", keep=512, vocab_size=100)
    assert (shape.keep, shape.vocab_size, shape.hidden_size) == (512, 100, 2048)
    with pytest.raises(ValueError, match='no size "7B": use one of'):
        DmaConfig.named("7B")


def test_number_kept():
    assert [keep_of(0.07, 0, n) for n in (1, 10, 99, 100, 101)] == [1, 1, 7, 7, 8]
    assert [keep_of([3, None], i, 50) for i in (0, 1)] == [3, None]
    assert keep_of(9, 0, 5) == 9


@torch.no_grad()
@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (2.0, "keep=2.0 is a share and must lie between 0 and 1: pass an integer"),
        (True, "keep=True must be an integer"),
        ([0.5, 3, 3], "keep by layer must hold integers or None, got 0.5"),
        ([8], "keep has 1 entries for 3 layers: give one a layer"),
        ("a", "keep='a' must be an integer"),
        (0, "keep=0 must be at least 1"),
    ],
    ids=["share", "bool", "share-by-layer", "short-list", "word", "zero"],
)
def test_what_is_assigned_later_is_checked_at_the_next_call(keep, message):
    model, layer = make_model(), make_layer()
    cache = LifetimeCache()
    model(random_ids(1, 9), past_key_values=cache)
    model.config.keep = layer.config.keep = keep
    for options in ({"use_cache": False}, {"past_key_values": cache}):
        with pytest.raises(ValueError, match=re.escape(message)):
            model(random_ids(1, 9), **options)
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(hidden(1, 9))
    model.config.keep = 7
    model(random_ids(1, 9), past_key_values=cache)  # Refused before any layer took tokens in.


@torch.no_grad()
def test_a_window_that_keep_has_no_room_for_is_refused_at_the_next_call():
    model, layer = make_model(window=5), make_layer(window=5)
    model.config.keep = layer.config.keep = 4
    for call in (lambda: model(random_ids(1, 9)), lambda: layer(hidden(1, 9))):
        with pytest.raises(ValueError, match="window=5 is more than keep=4"):
            call()


def test_configurations_of_before_have_no_window(tmp_path):
    config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    del saved["window"]
    file.write_text(json.dumps(saved))
    assert AutoConfig.from_pretrained(tmp_path).window == 0


def test_a_layer_beyond_the_list_is_named():
    layer = DynamicMaskAttention(config(keep=[3, 4, 5]), layer_idx=3)
    with pytest.raises(ValueError, match="keep has 3 entries, none for layer_idx=3"):
        layer(hidden(1, 9))


def test_a_threshold_ranks_only_what_it_admits():
    score = torch.tensor([[[0.9, 0.2, 0.8, float("nan"), 0.5, 1.0]]])
    mask = select(score, keep=2, threshold=0.5)
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 0, 0, 0, 0, 0],
            [1, 0, 1, 0, 0, 0],
            [1, 0, 1, 0, 0, 0],
            [1, 0, 1, 0, 0, 0],
            [1, 0, 0, 0, 0, 1],
        ]
    )
    assert torch.equal(mask.dense(6)[0, 0], expected.bool())
    above = Lifetimes.above(score, 0.5)
    assert torch.equal(select(score, keep=None, threshold=0.5).dense(6), above.dense(6))
