"""Stripes by the Triton kernels against the definition, pair by pair, in float64."""

import pytest
import torch
from attention_cases import naive_mask, padding, stripes, tensors
from kernel_cases import check_forward, require_triton

from dynmask.masks import Stripes

require_triton()

from dynmask.ops.triton.stripes import attend  # noqa: E402

RUNS = ((37, 201), (0, 149))


def one_head(columns, offsets):
    parts = torch.tensor(columns, dtype=torch.int64), torch.tensor(offsets)
    return Stripes((parts[0],) * 2, (parts[1],) * 2, torch.zeros(2, dtype=torch.bool))


def test_the_dense_mask_is_the_definition():
    mask = stripes(3, 45, corner=9, full=(1,)) & padding((4, 40), (0, 33))
    assert mask.dense(17, 45).equal(naive_mask(mask, 17, 45))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("q_len", "k_len"), [(1, 1), (65, 65), (201, 201), (300, 300), (77, 201), (9, 333)]
)
def test_prefill_and_chunks(q_len, k_len, bias, device):
    check_forward(attend, stripes(4, k_len + 1, full=(1,)), q_len, k_len, bias=bias, device=device)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("q_len", [1, 3, 23, 201])
@pytest.mark.parametrize("corner", [0, 50, 128, 260])
def test_padding_and_corner(q_len, corner, bias, device):
    mask = stripes(4, 201, corner=corner, full=(0,), seed=2) & padding(*RUNS)
    check_forward(attend, mask, q_len, 201, bias=bias, device=device)


@pytest.mark.parametrize("corner", [30, 64, 100, 400])
def test_rows_of_the_corner(corner, device):
    check_forward(
        attend, stripes(4, 193, corner=corner, full=(3,), seed=3), 193, 193, device=device
    )


@pytest.mark.parametrize(
    ("columns", "offsets"),
    [
        ([], [0]),
        ([0, 1, 63, 64, 65, 127, 128], [0]),
        ([], list(range(150))),
        (list(range(200)), list(range(70))),
        ([64, 96, 128, 160], list(range(130))),
        ([3, 5], [0, 1, 2, 90, 91, 170]),
        ([], list(range(0, 250, 2))),
        ([7, 100], [0, *range(40, 170)]),
        ([], [*range(90), *range(91, 255)]),
        ([500], [0, 600]),
    ],
    ids=["own", "columns", "window", "both", "edges", "lone", "holes", "far", "one hole", "beyond"],
)
@pytest.mark.parametrize("q_len", [5, 255])
def test_shapes_of_stripes(columns, offsets, q_len, device):
    check_forward(attend, one_head(columns, offsets), q_len, 255, shape=(1, 2, 1), device=device)


def test_streaming(device):
    check_forward(
        attend, Stripes.streaming(2, sinks=4, window=100), 290, 290, shape=(1, 2, 2), device=device
    )


@pytest.mark.parametrize("q_len", [1, 140])
@pytest.mark.parametrize("dim", [24, 64, 160])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["half", "float"])
def test_dtypes_and_head_sizes(q_len, dim, dtype, device):
    check_forward(
        attend, stripes(2, 140), q_len, 140, shape=(1, 2, 1), dim=dim, dtype=dtype, device=device
    )


@pytest.mark.parametrize("full", [(), (0, 2)], ids=["striped", "full"])
def test_decode_over_many_programs(full, device):
    mask = stripes(4, 3000, full=full) & padding((0, 2800), (1500, 3000))
    check_forward(attend, mask, 2, 3000, bias=True, device=device)


def test_all_heads_full_and_a_batch_row_without_tokens(device):
    mask = Stripes.causal(4) & padding((20, 20), (3, 141))
    check_forward(attend, mask, 141, 141, device=device)
    check_forward(attend, mask, 2, 141, device=device)


def test_tables_are_made_once_and_serve_longer_sequences(device):
    mask = stripes(4, 400).to(device)
    check_forward(attend, mask, 30, 201, device=device)
    made = len(mask.derived)
    check_forward(attend, mask, 30, 202, device=device)
    assert len(mask.derived) == made
    check_forward(attend, mask, 30, 400, device=device)


def test_hidden_keys_are_not_read_where_they_are_padding(device):
    mask = (stripes(4, 201) & padding(*RUNS)).to(device)
    q, k, v = (t.to(device) for t in tensors(2, 4, 2, 201, 201, 16))
    expected, _ = attend(q, k, v, mask, None, 0.25)
    hidden = ~mask.padding.dense(201)[:, None, :, None].to(device)
    out, lse = attend(
        q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan), mask, None, 0.25
    )
    assert out.equal(expected)
    assert not lse.isnan().any()


@pytest.mark.parametrize("q_len", [1, 70])
def test_any_strides_and_a_bias_in_half_precision(q_len, device):
    q, k, v = (t.to(device) for t in tensors(2, 4, 2, q_len, 70, 16))
    bias = torch.randn(2, 2, 70, device=device).half()
    mask = stripes(4, 70).to(device)
    expected = attend(q, k, v, mask, bias.float(), 0.25)
    turned = [t.mT.contiguous().mT for t in (q, k, v)]
    for one, other in zip(attend(*turned, mask, bias, 0.25), expected, strict=True):
        assert one.equal(other)
