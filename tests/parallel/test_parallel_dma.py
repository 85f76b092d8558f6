"""Tensor parallelism of DMA models, two processes on the CPU."""

import pytest
from dma_models import make_model
from dma_worker import CASES
from parallel_cases import outcomes

MODELS = {
    "plain": {},
    "other": {
        "tie_word_embeddings": False,
        "attention_bias": True,
        "residual_weights": True,
        "qk_norm": False,
        "score": "linear",
        "threshold": -3.0,
        "window": 3,
        "num_key_value_heads": 4,
    },
    "one": {"num_key_value_heads": 1},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, changes in MODELS.items():
        make_model(vocab_size=96, **changes).save_pretrained(folder / name)
    return outcomes("dma_worker.py", folder, folder)


@pytest.mark.parametrize("case", CASES)
def test_as_in_one_process(found, case):
    assert found[case] is None, found[case]
