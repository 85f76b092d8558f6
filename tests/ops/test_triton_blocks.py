"""Blocks by the Triton kernels against the definition, pair by pair, in float64."""

import pytest
import torch
from attention_cases import blocks, naive_blocks, padding, tensors
from kernel_cases import check_forward, require_triton

from dynmask.masks import Blocks

require_triton()

from dynmask.ops.triton import blocks as backend  # noqa: E402
from dynmask.ops.triton.blocks import attend  # noqa: E402

RUNS = ((37, 201), (0, 149))


def test_the_dense_mask_is_the_definition():
    mask = blocks(1, 2, 45) & padding((4, 40), (0, 33))
    assert mask.dense(17, 45).equal(naive_blocks(mask, 17, 45))


@pytest.mark.parametrize("tile", [1, 16, 50, 128, 192, 256])
@pytest.mark.parametrize("block", [1, 7, 64, 300])
def test_tiles_and_blocks(tile, block, device):
    mask = blocks(1, 2, 201, tile=tile, block=block, seed=tile)
    q_len = 7 if tile == 1 else 201
    check_forward(attend, mask, q_len, 201, shape=(1, 4, 2), bias=block == 64, device=device)


@pytest.mark.parametrize(
    ("q_len", "k_len"), [(1, 1), (1, 300), (5, 300), (17, 300), (40, 300), (171, 300)]
)
@pytest.mark.parametrize("tile", [32, 128])
@pytest.mark.parametrize("lists", [(1, 1), (2, 1), (1, 2)], ids=["shared", "heads", "batch"])
def test_decode_chunks_and_shared_lists(q_len, k_len, tile, lists, device):
    mask = blocks(*lists, 300, tile=tile, block=32, seed=q_len)
    check_forward(attend, mask, q_len, k_len, bias=True, shape=(2, 6, 2), device=device)


@pytest.mark.parametrize("q_len", [1, 30, 120, 201])
@pytest.mark.parametrize("tile", [48, 128])
@pytest.mark.parametrize("batch", [1, 2])
def test_padding(q_len, tile, batch, device):
    mask = blocks(batch, 2, 201, tile=tile, block=16, seed=3) & padding(*RUNS)
    check_forward(attend, mask, q_len, 201, device=device)


@pytest.mark.parametrize("q_len", [1, 140])
@pytest.mark.parametrize("dim", [24, 64, 160])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["half", "float"])
def test_dtypes_and_head_sizes(q_len, dim, dtype, device):
    mask = blocks(1, 1, 140, tile=128, block=16)
    check_forward(attend, mask, q_len, 140, shape=(1, 2, 1), dim=dim, dtype=dtype, device=device)


def test_all_blocks_are_causal_attention(device):
    indices = torch.arange(5).flip(0).repeat(1, 1, 3, 1).int()
    mask = Blocks(indices, torch.full((1, 1, 3), 5, dtype=torch.int32), 64, 128)
    assert mask.dense(300).equal(torch.ones(1, 1, 300, 300, dtype=torch.bool).tril())
    check_forward(attend, mask, 300, 300, device=device)


@pytest.mark.parametrize("q_len", [1, 201])
def test_nothing_listed(q_len, device):
    counts = torch.zeros(1, 1, 2, dtype=torch.int32)
    check_forward(
        attend, Blocks(counts[..., None][..., :0], counts, 16, 128), q_len, 201, device=device
    )


@pytest.mark.parametrize("q_len", [1, 201])
def test_blocks_far_beyond_the_keys(q_len, device):
    indices = torch.tensor([3, 2**31 - 1, 0, 2**30, 7], dtype=torch.int32).repeat(1, 1, 2, 1)
    mask = Blocks(indices, torch.full((1, 1, 2), 5, dtype=torch.int32), 16, 128)
    check_forward(attend, mask, q_len, 201, device=device)


@pytest.mark.parametrize("tile", [48, 128])
def test_lists_for_some_rows_at_a_time(tile, monkeypatch, device):
    calls = []
    run = backend._attend_rows
    monkeypatch.setattr(backend, "_attend_rows", lambda *a: calls.append(a) or run(*a))
    monkeypatch.setattr(backend, "_LIST_BYTES", 4 * 2 * 2 * 2 * 201)
    mask = blocks(1, 2, 201, tile=tile, block=32, seed=5) & padding(*RUNS)
    check_forward(attend, mask, 180, 201, bias=True, device=device)
    assert len(calls) == {48: 2, 128: 1}[tile]


def test_a_padded_copy_does_not_see_the_lists_of_the_mask(device):
    mask = blocks(1, 2, 201, tile=128, block=16, seed=4)
    check_forward(attend, mask, 201, 201, device=device)
    check_forward(attend, mask & padding(*RUNS), 201, 201, device=device)


@pytest.mark.parametrize("q_len", [1, 70])
def test_any_strides_and_a_bias_in_half_precision(q_len, device):
    q, k, v = (t.to(device) for t in tensors(2, 4, 2, q_len, 70, 16))
    bias = torch.randn(2, 2, 70, device=device).half()
    mask = blocks(1, 2, 70).to(device)
    expected = attend(q, k, v, mask, bias.float(), 0.25)
    turned = [t.mT.contiguous().mT for t in (q, k, v)]
    for one, other in zip(attend(*turned, mask, bias, 0.25), expected, strict=True):
        assert one.equal(other)
