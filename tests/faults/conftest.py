from __future__ import annotations

import pytest
import torch
from fault_models import make_model, plan_for
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(autouse=True)
def one_thread():
    # Not for speed alone: a forked child cannot use a pool of threads that its parent has started.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def plan():
    """A plan of the model that ``make_model()`` gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = plan_for(make_model())
    torch.set_num_threads(before)
    return made


@pytest.fixture
def model_folder(tmp_path):
    """A model of one layer with a tokenizer of bytes."""
    folder = tmp_path / "model"
    make_model(vocab_size=258, num_hidden_layers=1).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={a: i for i, a in enumerate([*alphabet, "!e"])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!e").save_pretrained(folder)
    return folder
