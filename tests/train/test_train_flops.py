import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from train_cases import SHAPE
from transformers import LlamaConfig, LlamaForCausalLM

from dynmask.dma import DmaConfig, DmaForCausalLM
from dynmask.train.flops import flops_per_token


@pytest.mark.parametrize("tied", [True, False])
def test_dense_model_against_torchs_counter(tied):
    """torch counts whole squares of attention, so the difference is half a square, less a half."""
    shape = SHAPE | {"tie_word_embeddings": tied, "hidden_size": 32, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=100, attn_implementation="eager"))
    length = 48
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, length, dtype=torch.int64), use_cache=False).logits.sum().backward()
    square = 12 * 3 * 2 * 16 * (length - (length + 1) / 2)
    norms = 6 * sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    expected = counter.get_total_flops() / (2 * length) - square + norms
    assert flops_per_token(model, length) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    ("keep", "same_as"), [(None, 128), (128, 128), (0.25, 32), ([8, 32], [8, 32]), (7, 7)]
)
def test_dma_counts_what_rows_keep(keep, same_as):
    shape = SHAPE | {"num_hidden_layers": 2}
    model = DmaForCausalLM(DmaConfig(**shape, vocab_size=100, keep=keep))
    each = same_as if isinstance(same_as, list) else [same_as] * 2
    keys = sum(sum(min(row + 1, most) for row in range(128)) / 128 for most in each)
    parameters = sum(p.numel() for p in model.parameters())
    assert flops_per_token(model, 128) == pytest.approx(6 * parameters + 12 * 2 * 8 * keys)


def test_a_share_counts_as_the_layer_keeps():
    """0.07 * 100 is a little over 7 in binary, and a row keeps 7."""
    share, count = (
        DmaForCausalLM(DmaConfig(**SHAPE, vocab_size=100, keep=keep)) for keep in (0.07, 7)
    )
    assert flops_per_token(share, 100) == flops_per_token(count, 100)


def test_threshold_follows_the_content():
    model = DmaForCausalLM(DmaConfig(**SHAPE, vocab_size=100, threshold=0.5))
    assert flops_per_token(model, 64) is None
