"""Gradients under stripes by the Triton kernels against autograd in float64, pair by pair."""

import pytest
import torch
from attention_cases import padding, stripes
from kernel_cases import GPU, check, each_bias, inputs, needs_gpu, place, require_triton

from dynmask.masks import Stripes
from dynmask.ops import attention

require_triton()

from dynmask.ops.triton import stripes as backend  # noqa: E402
from dynmask.ops.triton import stripes_backward, stripes_dkdv, stripes_dq  # noqa: E402
from dynmask.ops.triton.stripes_tables import stripe_keys, tile_tables  # noqa: E402

# What a kernel does not write, or reads beyond what was written, shows as NaN.
pytestmark = pytest.mark.usefixtures("poisoned")
RUNS = ((17, 80), (0, 61))


def check_gradients(
    mask, q_len, k_len, *, shape=(1, 2, 1), dim=16, dtype=torch.float32, biased=True
):
    """Hold the gradients to float64's; ``shape`` is ``(B, H, G)``."""
    q, k, v, bias = inputs(*shape, q_len, k_len, dim, dtype=dtype, biased=biased, seed=q_len)
    seen = mask.dense(q_len, k_len).expand(shape[0], -1, -1, -1)
    check(q, k, v, mask, bias, seen=place(seen)[0])


def one_head(columns, offsets):
    columns = torch.tensor(columns, dtype=torch.int64)
    return Stripes((columns,), (torch.tensor(offsets),), torch.zeros(1, dtype=torch.bool))


@pytest.fixture(params=["spans", "head by head"])
def sharing(request, monkeypatch):
    """Have a column's rows summed by several programs, or one kv head at a time."""
    monkeypatch.setattr(stripes_backward, "_LEAST_ROWS", 30)
    if request.param == "head by head":
        # Room for the columns of the two query heads of one kv head.
        monkeypatch.setattr(stripes_backward, "_PART_ELEMENTS", 500)


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize(("q_len", "k_len"), [(65, 65), (30, 77)])
def test_prefill_and_chunks(q_len, k_len):
    mask = stripes(4, 77, full=(1,), seed=1)
    check_gradients(mask, q_len, k_len, shape=(1, 4, 2))


@pytest.mark.parametrize(("corner", "q_len"), [(0, 80), (30, 80), (32, 3), (100, 50)])
def test_padding_and_corner(corner, q_len):
    mask = stripes(2, 80, corner=corner, full=(0,), seed=2) & padding(*RUNS)
    check_gradients(mask, q_len, 80, shape=(2, 2, 1), biased=q_len != 50)


@pytest.mark.parametrize(
    ("columns", "offsets"),
    [
        ([], [0]),
        ([0, 1, 31, 32, 33, 63, 64], [0]),
        (list(range(90)), list(range(35))),
        ([3, 5], [0, 1, 2, 45, 46, 65]),
        ([], list(range(0, 65, 2))),
        ([], [*range(45), *range(46, 70)]),
        ([500], [0, 600]),
    ],
    ids=["own", "columns", "both", "lone", "holes", "one hole", "beyond"],
)
def test_shapes_of_stripes(columns, offsets):
    check_gradients(one_head(columns, offsets), 71, 71, shape=(1, 1, 1))


@pytest.mark.parametrize("shape", [(1, 3, 1), (1, 3, 3)], ids=["three heads", "own keys"])
def test_groups(shape):
    check_gradients(stripes(3, 40, full=(1,)), 40, 40, shape=shape)


def test_full_heads_and_a_batch_row_without_tokens():
    check_gradients(Stripes.causal(2) & padding((20, 20), (3, 81)), 81, 81, shape=(2, 2, 1))


@pytest.mark.parametrize(
    ("dtype", "dim", "biased"),
    [
        (torch.float16, 72 if GPU else 24, False),
        (torch.float16, 160, True),
        (torch.float32, 24, False),
        (torch.float32, 160, True),
    ],
)
def test_dtypes_and_head_sizes(dtype, dim, biased):
    check_gradients(stripes(2, 40), 40, 40, dim=dim, dtype=dtype, biased=biased)


@needs_gpu
@each_bias
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("corner", [0, 300])
@pytest.mark.parametrize("k_len", [1000, 2100])
@pytest.mark.parametrize("dim", [64, 128])
def test_long(dim, k_len, corner, dtype, biased):
    mask = stripes(4, k_len, full=(1,), corner=corner) & padding((0, k_len), (99, k_len - 5))
    check_gradients(mask, k_len, k_len, shape=(2, 4, 2), dtype=dtype, dim=dim, biased=biased)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("ratio", [1, 2, 4])
@pytest.mark.parametrize("dim", [16, 32, 64, 80])
def test_small_heads_behind_padding(dim, ratio, dtype):
    # Two loops, the second without a mask, once gave wrong gradients in columns here alone.
    mask = stripes(2 * ratio, 900, full=(1,)) & padding((0, 900), (99, 900), (33, 870))
    check_gradients(mask, 900, 900, shape=(3, 2 * ratio, 2), dtype=dtype, dim=dim)


def test_padding_is_not_read():
    q, k, v, bias = place(*inputs(2, 2, 1, 80, 80, 16))
    mask = (stripes(2, 80, corner=9) & padding(*RUNS)).to(q.device)
    hidden = ~mask.padding.dense(80)[:, None, :, None].to(q.device)

    def run(fill):
        given = [t.masked_fill(hidden, fill).requires_grad_() for t in (q, k, v)]
        out = attention(*given, mask, bias=bias, impl="triton")
        return torch.autograd.grad(out, given, torch.ones_like(out).masked_fill(hidden, fill))

    for one, other in zip(run(torch.nan), run(0.0), strict=True):
        assert one.equal(other)


def test_any_strides_give_the_same_bits():
    q, k, v, bias = place(*inputs(1, 2, 1, 40, 40, 16))
    mask = stripes(2, 40).to(q.device)
    (grad,) = place(torch.randn(q.shape))

    def run(turn):
        given = [turn(t).requires_grad_() for t in (q, k, v)] + [bias.clone().requires_grad_()]
        out = attention(*given[:3], mask, bias=given[3], impl="triton")
        return torch.autograd.grad(out, given, turn(grad))

    results = [
        run(torch.clone),
        run(lambda t: t.mT.contiguous().mT),
        run(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
    ]
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


def test_tables_of_the_backward_pass_are_made_for_gradients_only():
    q, k, v, _ = place(*inputs(1, 2, 1, 40, 40, 16))
    mask = stripes(2, 40).to(q.device)
    attention(q, k, v, mask, impl="triton")
    made = len(mask.derived)
    attention(q.requires_grad_(), k, v, mask, impl="triton")
    assert len(mask.derived) > made
    made = len(mask.derived)
    attention(q, k, v, mask, impl="triton")
    assert len(mask.derived) == made


def arguments(biased, grad):
    q, k, v, bias = place(*inputs(1, 2, 1, 10, 13, 16, biased=biased))
    mask = (stripes(2, 13, corner=6) & padding((2, 13))).to(q.device)
    for t in (q, k, v, bias):
        if t is not None:
            t.requires_grad_(grad)
    keys = list(stripe_keys(mask, 13))
    tables = [
        list(tile_tables(mask, 13, *part.tiles(q)[:2]))
        for part in (backend, stripes_dq, stripes_dkdv)
    ]
    (runs,) = place(torch.tensor([[2, 13]], dtype=torch.int32))
    return q, k, v, bias, keys, *tables, mask.merged_corner, runs, 1, 11, 2, 0.25


@each_bias
def test_attention_passes_opcheck(biased):
    torch.library.opcheck(backend._prefill, arguments(biased, grad=True))


@each_bias
def test_backward_passes_opcheck(biased):
    args = arguments(biased, grad=False)
    out, lse = backend._prefill(*args)
    grads = torch.ones_like(out), torch.ones_like(lse) if biased else None
    rest = (*args[:5], *args[6:])
    torch.library.opcheck(backend._prefill_backward, (*rest, out, lse, *grads))
