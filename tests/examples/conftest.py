"""Loads the scripts of examples/, and makes tiny models for them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

import dynmask
from dynmask.assets import load_texts, load_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {
    "vocab_size": 4096,  # the embedded tokenizer's
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 0,
    "initializer_range": 0.3,  # flat attention would make every mask right
}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """An empty folder, no network, one thread, and random numbers that others do not notice."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def example():
    """``example(name)`` is the module ``examples/name.py``."""

    def load(name):
        path = EXAMPLES / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory, tokenizer):
    """A checkpoint of a tiny random Llama."""
    config = transformers.LlamaConfig(**TINY)
    return saved(transformers.LlamaForCausalLM, config, tokenizer, tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def dma_folder(tmp_path_factory, tokenizer):
    """A checkpoint of a tiny random DMA model that keeps 16 keys."""
    config = dynmask.DmaConfig(**TINY, keep=16)
    return saved(dynmask.DmaForCausalLM, config, tokenizer, tmp_path_factory.mktemp("dma"))


def saved(kind, config, tokenizer, folder):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def text_files(tmp_path_factory):
    """Two files of some 1,500 tokens."""
    folder = tmp_path_factory.mktemp("texts")
    files = []
    for number, text in enumerate(load_texts("calibration")[:2]):
        path = folder / f"{number}.txt"
        path.write_text(text[:6000])
        files.append(str(path))
    return files
