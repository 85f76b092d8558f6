"""The baselines that are trained: their models, and runs of a few steps of every type."""

import json
import subprocess
import sys

import pytest
import torch
from features import lacks_compile, needs
from train_cases import SHAPE, changed, losses
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from dynmask.assets import load_tokenizer
from dynmask.cli import main
from dynmask.dma import DmaConfig
from dynmask.train.models import build_model, check_model
from dynmask.train.mqar import Mqar
from dynmask.train.sections import Cosine, Phase
from dynmask.train.variants import MobaConfig, MobaForCausalLM, NsaConfig, NsaForCausalLM

NSA = {
    "compress_block": 8,
    "compress_stride": 4,
    "select_block": 8,
    "select_count": 3,
    "select_local": 1,
    "window": 9,
}
MLA = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8, "v_head_dim": 8}
MLA["qk_rope_head_dim"] = 4
TYPES = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "deepseek_v3": MLA,
    "nsa": NSA,
    "moba": {"block": 16, "top": 2},
    "dma": {"keep": 24},
}


def fields(kind):
    """The fields of a small model of a type, multi-head where it knows no groups."""
    made = {"type": kind, **SHAPE, **TYPES[kind]}
    if kind == "deepseek_v3":
        del made["num_key_value_heads"]
    return made


MODEL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # At the usual 0.02 attention would be almost flat, and every selection right.
    "initializer_range": 0.3,
}


def make(kind, **changes):
    torch.manual_seed(0)
    if kind == "nsa":
        return NsaForCausalLM(NsaConfig(**{**MODEL, **NSA, **changes})).eval()
    return MobaForCausalLM(MobaConfig(**{**MODEL, "block": 8, "top": 2, **changes})).eval()


def random_ids(batch, length, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (batch, length), generator=draw)


each_kind = pytest.mark.parametrize("kind", ["nsa", "moba"])


@pytest.mark.parametrize("kind", TYPES)
def test_a_short_run_learns(go, tmp_path, kind):
    """Pairs stand in each row; which ids are keys, values and filler is learnt first of all."""
    recipe = changed(
        model=fields(kind),
        data=Mqar(vocab=32, pairs=8, filler=2),
        phases=(Phase(64, 40),),
        schedule=Cosine(warmup_steps=1),
        lr=2e-2,
        log_every=5,
        save_every=100,
    )
    result = go(tmp_path, recipe)
    found = losses(result)
    assert found[-1] < found[0] - 0.4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.model_type == kind
    again = changed(recipe, model={"type": kind, "from": str(tmp_path / "model")})
    assert build_model(again, vocab_size=34).config.model_type == kind


def test_by_the_command(tmp_path, capsys):
    settings = [
        "model={type: nsa, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, "
        "num_attention_heads: 2, max_position_embeddings: 64, window: 16}",
        "data={type: mqar, vocab: 32, pairs: 4}",
        "phases=[{length: 64, steps: 2}]",
        "tokens_per_step=128",
        "schedule.warmup_steps=1",
        "eval_every=0",
    ]
    assert main(["train", "mqar", "--out", str(tmp_path), "--json", "--set", *settings]) == 0
    assert '"steps": 2' in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.window == 16


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "nsa", "keep": 3}, "unknown field keep"),
        ({"type": "nsa", "compress_block": 24}, "compress_block=24 must be a multiple of"),
        ({"type": "nsa", "select_count": 2}, "select_count=2 must be at least 3"),
        ({"type": "nsa", "window": "wide"}, "window='wide' must be an integer"),
        ({"type": "nsa", "compress_hidden": 0}, "compress_hidden=0 must be at least 1"),
        ({"type": "nsa", "attention_dropout": 0.1}, "attention_dropout=0.1 must be 0"),
        ({"type": "nsa", "size": "80M"}, "size='80M' is for type dma"),
        ({"type": "moba", "block": 0}, "block=0 and top=3 must be at least 1"),
        ({"type": "moba", "impl": "cuda"}, "impl='cuda' is not known"),
        ({"type": "moba", "num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"type": "mistral", "window": 3}, "unknown field window"),
        ({"type": "dma", "keep": 24, "window": 25}, "window=25 is more than keep=24"),
        ({"type": "dma", "window": "wide"}, "window='wide' must be an integer"),
    ],
)
def test_what_cannot_be_is_refused(model, message):
    with pytest.raises(ValueError, match=f"recipe: model: .*{message}"):
        check_model(changed(model={**SHAPE, **model}))


def test_latent_attention_has_no_experts():
    # Four layers: transformers' own default puts experts into all but the first three.
    shape = {**fields("deepseek_v3"), "num_hidden_layers": 4}
    model = build_model(changed(model=shape), vocab_size=4096)
    names = [name for name, _ in model.named_parameters()]
    assert any("kv_b_proj" in name for name in names)
    assert not any("expert" in name for name in names)
    assert model.config.num_key_value_heads == SHAPE["num_attention_heads"]


@torch.no_grad()
def test_mistrals_window_counts_the_own_token():
    torch.manual_seed(0)
    window = 9
    model = MistralForCausalLM(
        MistralConfig(**{**MODEL, "num_hidden_layers": 1}, sliding_window=window)
    )
    ids = random_ids(1, 30)
    other = ids.clone()
    other[:, 5] = (other[:, 5] - 2) % 94 + 3
    differs = (model(ids).logits != model(other).logits).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == list(range(5, 5 + window))


@torch.no_grad()
def test_all_blocks_are_a_llama():
    """The same weights under the same names, and with every block chosen the same outputs."""
    moba = make("moba", top=99)
    llama = LlamaForCausalLM(LlamaConfig(**MODEL)).eval()
    llama.load_state_dict(moba.state_dict())
    ids, mask = random_ids(3, 37), torch.ones(3, 37, dtype=torch.long)
    torch.testing.assert_close(moba(ids).logits, llama(ids).logits)
    mask[1, :9] = 0
    ours, theirs = (m(ids, attention_mask=mask).logits for m in (moba, llama))
    torch.testing.assert_close(ours[mask == 1], theirs[mask == 1])
    packed = torch.cat([torch.arange(20), torch.arange(17)])[None]
    ours, theirs = (m(ids, position_ids=packed, use_cache=False).logits for m in (moba, llama))
    torch.testing.assert_close(ours, theirs)
    assert (moba(ids).logits - make("moba")(ids).logits).abs().max() > 1e-3


@each_kind
@torch.no_grad()
def test_packed_padded_and_chunked_are_one_by_one(kind):
    model = make(kind)
    first, second = random_ids(2, 41), random_ids(2, 30, seed=1)
    apart = [model(ids, use_cache=False).logits for ids in (first, second)]
    ids = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(41), torch.arange(30)])[None].expand(2, -1).clone()
    packed = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, torch.cat(apart, 1))
    positions[1] = torch.arange(71)  # The second row is one document.
    mixed = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(mixed[0], packed[0])
    torch.testing.assert_close(mixed[1], model(ids[1:], use_cache=False).logits[0])

    padded = torch.stack([first[0], torch.cat([first[1, :11].new_zeros(11), second[1]])])
    for row in (padded[1:], padded):
        mask = torch.ones_like(row)
        mask[-1, :11] = 0
        logits = model(row, attention_mask=mask).logits
        torch.testing.assert_close(logits[-1, 11:], apart[1][1])
    torch.testing.assert_close(logits[0], apart[0][0])

    cache = DynamicCache()
    parts = [model(part, past_key_values=cache).logits for part in first.split([17, 1, 23], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), apart[0])
    cache.crop(29 - 41)
    again = model(first[:, 29:], past_key_values=cache).logits
    torch.testing.assert_close(again, apart[0][:, 29:])


@torch.no_grad()
def greedy(model, ids, count):
    """One text ``[N]``, all of it computed anew for every token."""
    for _ in range(count):
        logits = model(ids[None], use_cache=False).logits[0, -1]
        logits[2] = -torch.inf  # min_new_tokens rules the end out.
        ids = torch.cat([ids, logits.argmax()[None]])
    return ids[-count:]


@each_kind
def test_generation(kind):
    model, ids = make(kind), random_ids(2, 30)
    settings = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    expected = torch.stack([greedy(model, row, 9) for row in ids])
    ones = torch.ones_like(ids)
    for more in ({}, {"use_cache": False}, {"prefill_chunk_size": 7}):
        out = model.generate(ids, attention_mask=ones, **settings, **more)
        assert torch.equal(out[:, 30:], expected)
    padded = torch.cat([ids.new_zeros(2, 5), ids], 1)
    padded[0, :30], padded[0, 30:] = ids[0].new_zeros(30), ids[0, :5]
    out = model.generate(padded, attention_mask=(padded != 0).long(), **settings)
    assert torch.equal(out[0, 35:], greedy(model, ids[0, :5], 9))
    assert torch.equal(out[1, 35:], expected[1])


@each_kind
def test_what_models_refuse(kind):
    model, ids = make(kind), random_ids(1, 12)
    with pytest.raises(ValueError, match="StaticCache is not read"):
        model(ids, past_key_values=StaticCache(model.config, max_cache_len=20))
    with pytest.raises(ValueError, match="knows no argument output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model()
    mask = torch.tensor([[1] * 5 + [0] + [1] * 6])
    with pytest.raises(ValueError, match="several runs"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="documents"):
        model(ids, position_ids=torch.zeros_like(ids), past_key_values=DynamicCache())


@each_kind
def test_compiled_and_checkpointed(kind):
    """As a run on a GPU has it: each layer traced, its activations computed again."""
    needs(lacks_compile)
    model, ids = make(kind, num_hidden_layers=1).train(), random_ids(2, 50)
    positions = torch.cat([torch.arange(33), torch.arange(17)])[None]
    expected = []
    for given in ({}, {"position_ids": positions}):
        logits = model(ids, use_cache=False, **given).logits
        model.zero_grad()
        logits.square().mean().backward()
        expected.append((logits, model.model.embed_tokens.weight.grad.clone()))
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    for given, (logits, grad) in zip(({}, {"position_ids": positions}), expected, strict=True):
        again = model(ids, use_cache=False, **given).logits
        torch.testing.assert_close(again, logits)
        model.zero_grad()
        again.square().mean().backward()
        torch.testing.assert_close(model.model.embed_tokens.weight.grad, grad)


@each_kind
def test_fresh_weights(kind, tmp_path):
    """What is made by the configuration alone starts as it would without transformers."""
    model = make(kind, initializer_range=0.02)
    for name, weight in model.named_parameters():
        if name.endswith(("memory", "places", "bias")):
            assert not weight.any()
        elif "norm" not in name:
            assert weight.std().item() == pytest.approx(0.02, rel=0.2), name
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    ids = random_ids(1, 40)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_sizes_can_be_made_equal():
    """MoBA has Llama's parameters; those that NSA has more can be taken from its MLP."""

    def count(**given):
        model = {**SHAPE, "intermediate_size": 99, **given}
        return build_model(changed(model=model), vocab_size=4096).num_parameters()

    llama = count(type="llama")
    assert count(type="moba") == count(type="mistral") == llama
    more = count(type="nsa", **NSA) - llama
    width = 3 * SHAPE["hidden_size"]  # weights of one channel of the MLP
    narrow = 99 - more // width
    assert 0 <= count(type="nsa", **{**NSA, "intermediate_size": narrow}) - llama < width


@pytest.mark.parametrize("kind", ["dma", "nsa", "moba"])
def test_the_command_loads_and_measures_its_checkpoints(kind, tmp_path):
    """In a process of its own: nothing here made the types known there."""
    config = {"dma": DmaConfig, "nsa": NsaConfig, "moba": MobaConfig}[kind]
    tokenizer = load_tokenizer()
    sizes = {**MODEL, **TYPES[kind], "vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    AutoModelForCausalLM.from_config(config(**sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = "--json eval longeval --lines 9 --n 2 --questions 2 --device cpu"
    command = [sys.executable, "-m", "dynmask", *words.split(), "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["quality"][0]["n"] == 2
