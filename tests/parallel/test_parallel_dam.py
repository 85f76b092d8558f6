"""Tensor parallelism of transformers' models under `accelerate`, two processes on the CPU."""

import pytest
from dam_worker import CASES
from hf_models import make_model
from parallel_cases import outcomes
from torch import nn

from dynmask.hf.parallel import heads_here
from dynmask.masks import Stripes


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in ("llama", "llama-mha", "qwen3"):
        make_model(kind, vocab_size=96).save_pretrained(folder / kind)
    return outcomes("dam_worker.py", folder, folder)


@pytest.mark.parametrize("case", CASES)
def test_as_in_one_process(found, case):
    assert found[case] is None, found[case]


def test_heads_that_nothing_tells():
    with pytest.raises(ValueError, match="computes 2 of 4 heads on one of 1 processes"):
        heads_here(nn.Linear(2, 2), Stripes.causal(4), 2)
