"""The files of the embedded model are whole, and the model can do what its card says."""

import hashlib
import json
import lzma
from itertools import combinations

import pytest
import torch
from safetensors import safe_open

from dynmask.assets import TEXTS, load_model, load_texts, load_tokenizer, model_folder
from dynmask.eval import longeval, needle, perplexity

FOLDER = model_folder().parent


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_digests_cover_every_file():
    rows = (FOLDER / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    stated = {name: digest for digest, _, name in (row.partition("  ") for row in rows)}
    files = {
        path.relative_to(FOLDER).as_posix(): path
        for path in FOLDER.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and path.name != "SHA256SUMS"
    }
    assert stated.keys() == files.keys()
    for name, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == stated[name], name


def test_shape(model, tokenizer):
    config = model.config
    assert config.model_type == "llama"
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.max_position_embeddings == tokenizer.model_max_length == 8192
    assert config.vocab_size == len(tokenizer) == 4096
    assert config.eos_token_id == tokenizer.eos_token_id
    assert model.num_parameters() == 11_309_952
    assert not model.training


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["default", "bf16"])
def test_dtype(dtype):
    model = load_model(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.float32}


def test_weights_are_small_bf16():
    path = model_folder() / "model.safetensors"
    assert path.stat().st_size < 24e6
    with safe_open(path, framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


@pytest.mark.parametrize(
    ("name", "count", "least"),
    [("calibration", 10, 15_000), ("perplexity", 6, 30_000), ("haystack", 4, 58_000)],
)
def test_texts(name, count, least):
    texts = load_texts(name)
    assert len(texts) == len(set(texts)) == count
    assert all(len(text) >= least for text in texts)


def test_no_book_is_in_two_sets():
    def rows(name):
        with lzma.open(FOLDER / "text" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
            return [json.loads(row) for row in file]

    books = {name: {row["id"] for row in rows(name)} for name in TEXTS}
    for a, b in combinations(TEXTS, 2):
        assert not books[a] & books[b]
        # Not by name alone: no passage of one stands in the other.
        for row in rows(a):
            passages = [row["text"][i : i + 200] for i in range(0, len(row["text"]) - 200, 2000)]
            assert not any(p in other["text"] for p in passages for other in rows(b))


def test_unknown_set():
    with pytest.raises(ValueError, match="'train' is no set of texts; choose one of calibration"):
        load_texts("train")


def test_it_finds_lines(model, tokenizer):
    assert longeval(model, tokenizer, lines=30, n=10, seed=1).score >= 0.9


def test_it_finds_needles(model, tokenizer):
    result = needle(model, tokenizer, load_texts("haystack"), length=1024, n=5, seed=1)
    assert result.score >= 0.8


def test_it_has_learned_english(model, tokenizer):
    result = perplexity(model, tokenizer, load_texts("perplexity"), length=1024, windows=2)
    assert 10 < result.score < 60
