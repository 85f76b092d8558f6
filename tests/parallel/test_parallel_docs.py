"""The scripts of docs/guide/parallel.md run as they stand, in two processes on the CPU."""

import ast
import re
from pathlib import Path

import dma_models
import hf_models
import pytest
from parallel_cases import launch

from dynmask.assets import load_texts, load_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "parallel.md"
MODELS = {"tensor.py": hf_models.make_model, "prompt.py": dma_models.make_model}
SHAPE = {"vocab_size": 4096, "max_position_embeddings": 4096, "pad_token_id": 1}


def scripts():
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```py\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert all(ast.parse(block) for block in blocks)
    named = (re.match(r"# (\w+\.py)\n", block) for block in blocks)
    return {n[1]: block for n, block in zip(named, blocks, strict=True) if n}


@pytest.mark.parametrize("name", MODELS)
def test_script(name, tmp_path):
    kind = ["llama"] if name == "tensor.py" else []
    MODELS[name](*kind, **SHAPE).save_pretrained(tmp_path / "model")
    load_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(load_texts("haystack")[0][:3600], encoding="utf-8")
    (tmp_path / name).write_text(scripts()[name], encoding="utf-8")
    args = tmp_path / name, tmp_path / "model", tmp_path / "text.txt"
    zero, one = (text.partition(" {")[0] for text in launch(tmp_path / "logs", *args))
    assert zero.startswith("0 ")
    assert one == zero.replace("0", "1", 1), "the processes went on with other tokens"


def test_every_script_is_run():
    assert scripts().keys() == MODELS.keys()
