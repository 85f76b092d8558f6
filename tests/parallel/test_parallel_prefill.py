"""Context parallel prefill of DMA models, two processes on the CPU."""

import pytest
import torch
from dma_models import make_model
from parallel_cases import outcomes
from prefill_worker import CASES

from dynmask.dma.parallel import context_prefill


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return outcomes("prefill_worker.py", tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("case", CASES)
def test_as_in_one_process(found, case):
    assert found[case] is None, found[case]


def test_alone():
    with pytest.raises(ValueError, match="start them with torchrun"):
        context_prefill(make_model(), torch.zeros(1, 9, dtype=torch.int64))
