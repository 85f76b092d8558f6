import functools
import hashlib

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from dynmask.dma import DmaConfig, DmaForCausalLM
from dynmask.train.arguments import training_arguments
from dynmask.train.batches import Steps
from dynmask.train.fields import changed, differences
from dynmask.train.mixture import Mixture, Sequences
from dynmask.train.models import build_model, check_model
from dynmask.train.mqar import Mqar
from dynmask.train.recipe import Recipe
from dynmask.train.sections import Cosine, HubText, Phase, Text, WarmupStableDecay

GOOD = {
    "model": {"type": "llama", "max_position_embeddings": 128, "hidden_size": 16},
    "data": {"type": "text", "path": "somewhere"},
    "phases": [{"length": 64, "steps": 3}, {"length": 128, "steps": 2}],
    "tokens_per_step": 256,
    "schedule": {"type": "cosine", "warmup_steps": 2},
}
RETRIEVAL = {"type": "retrieval"}
WSD = {"type": "wsd", "warmup_steps": 2}


def load(tmp_path, *settings, **changes):
    raw = {k: v for k, v in (GOOD | changes).items() if v is not ...}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return Recipe.load(path, settings=list(settings))


def test_load(tmp_path):
    mixture = RETRIEVAL | {"mixture": {"questions": [2, 3]}}
    recipe = load(tmp_path, data=mixture, betas=[0.8, 0.9], lr=1)
    assert recipe.phases == (Phase(64, 3), Phase(128, 2))
    assert recipe.data.mixture == Mixture(questions=(2, 3))
    assert recipe.schedule == Cosine(warmup_steps=2)
    assert (recipe.betas, recipe.lr, recipe.steps, recipe.longest) == ((0.8, 0.9), 1, 5, 128)
    assert [recipe.length_at(step) for step in range(5)] == [64, 64, 64, 128, 128]
    assert recipe.phase_at(4) == (1, 1)
    for step in (-1, 5):
        with pytest.raises(ValueError, match=f"step={step} is not in"):
            recipe.length_at(step)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"type": "text", "packed": False}, Text(packed=False)),
        ({"type": "dataset", "path": "x/y", "config": None}, HubText("x/y")),
        ({"type": "mqar", "pairs": 8}, Mqar(pairs=8)),
    ],
    ids=["text", "dataset", "mqar"],
)
def test_kinds_of_data(tmp_path, data, expected):
    recipe = load(tmp_path, data=data)
    assert recipe.data == expected
    assert recipe.to_dict()["data"]["type"] == data["type"]


def test_what_is_written_is_what_was_read(tmp_path):
    recipe = load(tmp_path, schedule=WSD | {"decay_steps": 1})
    assert recipe.schedule == WarmupStableDecay(2, 1)
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()), encoding="utf-8")
    assert Recipe.load(path) == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1}, "recipe: unknown field learning_rate; known are model, data"),
        ({"data": RETRIEVAL | {"mixture": {"book": 1}}}, "mixture: unknown field book; known are"),
        ({"data": RETRIEVAL | {"mixture": {"text": -1.0}}}, "mixture: text=-1.0"),
        ({"data": RETRIEVAL | {"mixture": {"questions": 4}}}, "must be a list of two integers"),
        ({"data": RETRIEVAL | {"mixture": [1]}}, r"mixture: \[1\] is not a mapping"),
        ({"data": {"type": "books"}}, "data: type='books' must be one of retrieval, text, dataset"),
        ({"data": "books"}, "data: type=None must be one of"),
        ({"data": {"type": "text", "packed": 1}}, "data: packed=1 must be true or false"),
        ({"data": {"type": "text", "path": 1}}, "data: path=1 must be a string"),
        ({"data": {"type": "mqar", "pairs": 4096}}, "pairs=4096 must be from 1 to 4095"),
        ({"data": {"type": "mqar", "filler": 0}}, "filler=0"),
        ({"data": {"type": "mqar", "fewest": 513}}, "fewest=513 must be from 1 to pairs=512"),
        ({"model": ...}, "the field 'model' is missing"),
        ({"model": {}}, "model: type=None must be one of llama, dma"),
        ({"phases": ...}, "the field 'phases' is missing"),
        ({"phases": []}, "phases: give at least one"),
        ({"phases": 5}, "phases=5 must be a list"),
        ({"phases": [5]}, "recipe: phases: 5 is not a mapping"),
        ({"phases": [{"length": 64}]}, "recipe: phases: the field 'steps' is missing"),
        ({"phases": [{"length": 32, "steps": 9}]}, "length >= 64"),
        ({"data": {"type": "mqar"}, "phases": [{"length": 8, "steps": 9}]}, "length >= 16"),
        ({"phases": [{"length": 96, "steps": 9}]}, "divides tokens_per_step=256"),
        ({"phases": [{"length": 64, "steps": 0}]}, "steps >= 1"),
        ({"phases": [{"length": 64, "steps": 1.5}]}, "steps=1.5 must be an integer"),
        ({"tokens_per_step": -256}, "tokens_per_step=-256"),
        ({"micro_tokens": 96}, "micro_tokens=96 must be over 0 and divide tokens_per_step=256"),
        ({"micro_tokens": 64}, "divides tokens_per_step=256, and micro_tokens if given"),
        ({"lr": "2e-3"}, "lr='2e-3' must be a number"),
        ({"laerning": 1, "modle": 1}, r"field laerning, modle \(did you mean model\?\); known are"),
        ({"clip": float("inf")}, "clip=inf is out of its range"),
        ({"schedule": {"type": "cosine"}}, "warmup_steps=200 is more than the 5 steps"),
        ({"lr": 0}, "lr=0 is out of its range"),
        ({"schedule": GOOD["schedule"] | {"floor": 2}}, "schedule: floor=2"),
        ({"schedule": WSD | {"decay_steps": 4}}, "schedule: decay_steps=4 is out of its range"),
        ({"schedule": {"type": "linear"}}, "schedule: type='linear' must be one of cosine, wsd"),
        ({"save_every": 0}, "save_every=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": True}, "seed=True must be an integer"),
        ({"compile": 1}, "compile=1 must be true or false"),
        ({"betas": [0.9]}, "betas=.* must be a list of two numbers"),
        ({"betas": [0.9, 1.0]}, "betas=.* is out of its range"),
    ],
)
def test_wrong_recipe_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **changes)


def test_a_vocabulary_size_beside_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="is embedded: set tokenizer=null, too"):
        Recipe.load("tiny", settings=["vocab_size=512"])
    changed = Recipe.load("tiny", settings=["vocab_size=512", "tokenizer=null"])
    assert changed.vocab_size == 512


@pytest.mark.parametrize("text", ["- a list", "a: [", ""])
def test_no_recipe_at_all(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="recipe"):
        Recipe.load(path)
    with pytest.raises(ValueError, match=r"the name of a recipe: 1\.7B, .*embedded"):
        Recipe.load("no-such-recipe")


def test_settings(tmp_path):
    recipe = load(
        tmp_path, "lr=1e-3", "phases.1.steps=7", "model.hidden_size=8", "data.packed=false"
    )
    assert (recipe.lr, recipe.phases[1].steps, recipe.data.packed) == (1e-3, 7, False)
    assert recipe.model["hidden_size"] == 8
    made = changed({"a": 1}, ["b.c=[1, 2]", "d=text", "e=*.txt", "f=null"])
    assert made == {"a": 1, "b": {"c": [1, 2]}, "d": "text", "e": "*.txt", "f": None}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr", "--set lr: write KEY=VALUE"),
        ("phases.9.steps=1", "no place phases.9.steps"),
        ("phases.first.steps=1", "no place phases.first.steps"),
        ("lr.x=1", "no place lr.x"),
        ("size=3", "unknown field size"),
    ],
)
def test_wrong_setting(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, setting, lr=1.0)


def test_differences():
    old = {"a": 1, "b": {"c": 2, "d": [1]}, "gone": 0}
    new = {"a": 1, "b": {"c": 3, "d": [1]}, "new": "x"}
    assert differences(old, new) == ["b.c: 3 was 2", "new: 'x' was None", "gone: None was 0"]


@pytest.mark.parametrize(
    ("micro", "processes", "parts"), [(None, 1, 1), (None, 2, 2), (128, 1, 2), (128, 2, 2)]
)
def test_micro_batches(tmp_path, micro, processes, parts):
    assert load(tmp_path, micro_tokens=micro).parts(processes) == parts


@pytest.mark.parametrize(("micro", "processes"), [(None, 3), (None, 4), (128, 4), (256, 2)])
def test_micro_batches_that_cannot_be_shared(tmp_path, micro, processes):
    with pytest.raises(ValueError, match=f"over {processes} processes"):
        load(tmp_path, micro_tokens=micro).parts(processes)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("80M", 110), ("200M", 234), ("680M", 730), ("1.7B", 1720), ("mqar", 1.2), ("tiny", 1.31)],
)
def test_recipes_of_the_package(name, millions):
    recipe = Recipe.load(name)
    with torch.device("meta"):
        size = getattr(recipe.data, "vocab_size", recipe.vocab_size)
        model = build_model(recipe, vocab_size=151_669 if name == "1.7B" else size)
    assert isinstance(model, DmaForCausalLM)
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=0.03)
    # A row must be longer than what it keeps, or nothing is ever selected.
    assert recipe.longest > model.config.keep


@pytest.mark.parametrize(
    ("name", "steps", "tokens", "lr"),
    [
        ("80M", 13_500, 0.128, 3e-3),
        ("200M", 20_800, 0.192, 2e-3),
        ("680M", 35_000, 0.392, 1e-3),
        ("1.7B", 40_000, 1.0, 1e-3),
    ],
)
def test_sizes_follow_table_4(name, steps, tokens, lr):
    recipe = Recipe.load(name)
    assert (recipe.steps, recipe.lr, recipe.weight_decay, recipe.clip) == (steps, lr, 0.01, 1.0)
    assert recipe.tokens_per_step == pytest.approx(tokens * 1e6, rel=0.05)
    assert isinstance(recipe.schedule, WarmupStableDecay)


def test_the_embedded_run_is_what_it_was(corpus, tokenizer):
    """Batches, weights and optimizer of the run that made the model in the package."""
    recipe = Recipe.load("embedded")
    steps = Steps(Sequences(corpus, tokenizer, recipe.data.mixture), recipe)
    digest = hashlib.sha256()
    for number in (0, 1500):
        digest.update(steps[number]["input_ids"].numpy().tobytes())
        digest.update(steps[number]["weights"].numpy().tobytes())
    assert digest.hexdigest() == "792905e6a7bee92533e089ad32966f10283e520e6423f346ff6c1234a7439d80"
    model = build_model(
        recipe, vocab_size=4096, eos_token_id=tokenizer.eos_token_id, pad_token_id=1
    )
    fields = {name: value for name, value in recipe.model.items() if name != "type"}
    set_seed(0)
    expected = LlamaForCausalLM(
        LlamaConfig(**fields, vocab_size=4096, bos_token_id=None, eos_token_id=0, pad_token_id=1)
    )
    assert model.num_parameters() == 11_309_952
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def test_arguments_of_the_embedded_run(tmp_path):
    made = training_arguments(Recipe.load("embedded"), tmp_path, workers=2)
    kept = {
        "max_steps": 6000,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.02},
        "warmup_steps": 200,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "seed": 0,
    }
    assert {name: getattr(made, name) for name in kept} == kept


def test_unknown_field_of_the_model(tmp_path):
    for kind in ("llama", "dma"):
        recipe = load(tmp_path, model={"type": kind, "num_layers": 2})
        with pytest.raises(
            ValueError, match=r"num_layers \(did you mean num_hidden_layers\?\); known"
        ):
            build_model(recipe, vocab_size=64)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "llama", "size": "80M"}, "size='80M' is for type dma"),
        ({"type": "dma", "size": "80K"}, 'no size "80K"'),
        ({"type": "dma", "score": "log"}, "score='log' is not known"),
        ({"type": "dma", "a_std": -0.1}, "a_std=-0.1 must be"),
        ({"type": "llama", "a_std": 0.1}, "unknown field a_std"),
        ({"type": "dma", "max_position_embeddings": 64}, "max_position_embeddings=64 must be at"),
    ],
)
def test_models_that_cannot_be(tmp_path, model, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_model(load(tmp_path, model=model), vocab_size=64)


@pytest.mark.parametrize("kind", ["llama", "dma"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_size", "abc", "hidden_size='abc' must be an integer"),
        ("hidden_size", [16], r"hidden_size.*\[16\]"),
        ("hidden_size", -16, "hidden_size=-16"),
        ("rms_norm_eps", "x", "rms_norm_eps='x' must be a number"),
        ("tie_word_embeddings", "maybe", "tie_word_embeddings='maybe' must be true or false"),
        ("num_attention_heads", 3, "num_attention_heads=3"),
        ("num_attention_heads", 0, "num_attention_heads=0"),
        ("hidden_act", "foo", "hidden_act='foo' is not known: use one of gelu"),
        ("hidden_act", 3, "hidden_act=3 must be a string"),
        ("dtype", "foo", "dtype='foo'"),
        ("model_type", "gpt2", "unknown field model_type"),
    ],
)
def test_fields_of_the_model_are_refused_by_name(tmp_path, kind, name, value, message):
    recipe = load(tmp_path, model={"type": kind, **SMALL, name: value})
    for refuse in (check_model, functools.partial(build_model, vocab_size=64)):
        with pytest.raises(ValueError, match=f"^recipe: model: .*{message}"):
            refuse(recipe)


def test_checkpoint_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"recipe: model: from=.*config\.json"):
        build_model(load(tmp_path, model={"type": "dma", "from": str(tmp_path)}), vocab_size=64)


SMALL = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


def test_model_from_a_checkpoint(tmp_path):
    first = DmaForCausalLM(DmaConfig(**SMALL, keep=32))
    first.save_pretrained(tmp_path / "dma")
    source = str(tmp_path / "dma")
    rope = {"rope_type": "default", "rope_theta": 100000.0}
    fields = {"type": "dma", "from": source, "keep": 8, "window": 4, "rope_parameters": rope}
    check_model(load(tmp_path, model=fields), vocab_size=64)
    model = build_model(load(tmp_path, model=fields), vocab_size=64)
    assert (model.config.keep, model.config.window) == (8, 4)
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    for one, other in zip(first.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"from=.*: it is a dma model, not a llama one"):
        build_model(load(tmp_path, model={"type": "llama", "from": source}), vocab_size=64)
    with pytest.raises(ValueError, match="a_std is for a fresh model or a dense"):
        check_model(load(tmp_path, model=fields | {"a_std": 0.1}))
    for check in (check_model, functools.partial(build_model, vocab_size=64)):
        with pytest.raises(ValueError, match="recipe: model: window=9 is more than keep=8"):
            check(load(tmp_path, model=fields | {"window": 9}))
    with pytest.raises(ValueError, match="vocab_size=96 is less than the 97 tokens"):
        check_model(load(tmp_path, model=fields), vocab_size=97)
    with pytest.raises(ValueError, match="vocab_size=96 is less than the 97 tokens"):
        build_model(load(tmp_path, model=fields), vocab_size=97)


def test_model_from_a_dense_one(tmp_path):
    dense = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)).eval()
    dense.save_pretrained(tmp_path / "dense")
    fields = {"type": "dma", "from": str(tmp_path / "dense"), "keep": 64}
    model = build_model(load(tmp_path, model=fields | {"a_std": 0.0}), vocab_size=64).eval()
    assert isinstance(model, DmaForCausalLM)
    ids = torch.arange(40)[None]
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="hidden_act cannot be changed while a llama model is"):
        build_model(load(tmp_path, model=fields | {"hidden_act": "gelu"}), vocab_size=64)
