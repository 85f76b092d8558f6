"""Gradients under blocks by the Triton kernels against autograd in float64, pair by pair."""

import pytest
import torch
from attention_cases import blocks, padding
from kernel_cases import KINDS, check, each_bias, inputs, needs_gpu, place, require_triton

from dynmask.masks import Blocks
from dynmask.ops import attention

require_triton()

from dynmask.masks.triton.block_tiles import block_tiles  # noqa: E402
from dynmask.ops.triton import blocks as backend  # noqa: E402
from dynmask.ops.triton import blocks_backward  # noqa: E402

# What a kernel does not write, or reads beyond what was written, shows as NaN.
pytestmark = pytest.mark.usefixtures("poisoned")
RUNS = ((17, 90), (0, 61))


def check_gradients(
    mask, q_len, k_len, *, shape=(2, 4, 2), dim=16, dtype=torch.float32, biased=True
):
    """Hold the gradients to float64's; ``shape`` is ``(B, H, G)``."""
    q, k, v, bias = inputs(*shape, q_len, k_len, dim, dtype=dtype, biased=biased, seed=q_len)
    seen = mask.dense(q_len, k_len).expand(shape[0], shape[2], -1, -1)
    seen = seen.repeat_interleave(shape[1] // shape[2], 1)
    assert mask.indices.shape[3] == 0 or seen.any()
    check(q, k, v, mask, bias, seen=place(seen)[0])


@pytest.fixture(params=["whole", "shared out"])
def sharing(request, monkeypatch):
    """Have a block's tiles walked by one program, or cut into as many runs as can be."""
    if request.param == "shared out":
        monkeypatch.setattr(blocks_backward, "_LEAST_ROWS", 1)
        monkeypatch.setattr(blocks_backward, "_WAVES", 100)
    else:
        monkeypatch.setattr(blocks_backward, "_PART_ELEMENTS", 0)


@pytest.mark.parametrize(
    ("tile", "block", "q_len", "seed"),
    [(1, 16, 17, 1), (16, 7, 41, 3), (50, 33, 41, 3), (64, 300, 33, 1)],
)
@pytest.mark.usefixtures("sharing")
def test_tiles_and_blocks(tile, block, q_len, seed):
    mask = blocks(1, 1, 41, tile=tile, block=block, seed=seed)
    check_gradients(mask, q_len, 41, shape=(1, 2, 1), biased=block == 33)


def test_many_small_blocks_and_more_than_a_tile_of_keys():
    check_gradients(blocks(1, 1, 12, tile=128, block=1), 12, 12, shape=(1, 1, 1))
    check_gradients(blocks(1, 1, 90, tile=128, block=70, seed=2), 90, 90, shape=(1, 1, 1))


@pytest.mark.parametrize(
    ("lists", "shape"),
    [((1, 1), (2, 2, 2)), ((2, 1), (2, 6, 2)), ((1, 2), (2, 4, 2))],
    ids=["shared", "heads", "batch"],
)
@pytest.mark.usefixtures("sharing")
def test_shared_lists(lists, shape):
    check_gradients(blocks(*lists, 17, tile=8, block=8, seed=4), 17, 17, shape=shape)


@pytest.mark.parametrize(("batch", "q_len"), [(1, 1), (1, 90), (2, 40)])
def test_padding(q_len, batch):
    mask = blocks(batch, 1, 90, tile=48, block=16, seed=3) & padding(*RUNS)
    check_gradients(mask, q_len, 90, shape=(2, 2, 1))


@each_bias
@pytest.mark.parametrize("dim", [24, 160])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["half", "float"])
def test_dtypes_and_head_sizes(dim, dtype, biased):
    mask = blocks(1, 1, 40, tile=32, block=16)
    check_gradients(mask, 40, 40, shape=(1, 2, 1), dim=dim, dtype=dtype, biased=biased)


@needs_gpu
@each_bias
@pytest.mark.parametrize(("dtype", "dim"), KINDS[1:])
@pytest.mark.parametrize(("tile", "block"), [(1, 32), (64, 64), (128, 512)])
@pytest.mark.parametrize("k_len", [1000, 2100])
def test_long(tile, block, k_len, dtype, dim, biased):
    mask = blocks(1, 2, k_len, tile=tile, block=block)
    check_gradients(mask, k_len, k_len, shape=(1, 8, 2), dtype=dtype, dim=dim, biased=biased)


def test_nothing_listed_and_blocks_far_beyond_the_keys():
    counts = torch.tensor([[[0, 5]]], dtype=torch.int32)
    indices = torch.tensor([3, 2**31 - 1, 0, 2**30, 7], dtype=torch.int32).repeat(1, 1, 2, 1)
    check_gradients(Blocks(indices, counts, 8, 16), 31, 31, shape=(1, 2, 1))
    check_gradients(Blocks(indices[..., :0], counts.clamp_max(0), 8, 16), 31, 31)


def test_lists_for_some_rows_at_a_time(monkeypatch):
    calls = []
    run = backend._attend_rows
    monkeypatch.setattr(backend, "_attend_rows", lambda *a: calls.append(a) or run(*a))
    monkeypatch.setattr(backend, "_LIST_BYTES", 4 * 2 * 1 * 2 * 90)
    check_gradients(blocks(1, 1, 90, tile=24, block=32, seed=5) & padding(*RUNS), 80, 90)
    assert len(calls) == 2


def test_keys_with_a_bias_of_minus_infinity_get_no_gradient():
    q, k, v, bias = (t.requires_grad_() for t in place(*inputs(1, 2, 1, 40, 40, 16)))
    hidden = torch.arange(40, device=q.device) < 20
    mask = blocks(1, 1, 40, tile=16, block=8, seed=3).to(q.device)
    out = attention(q, k, v, mask, bias=bias.masked_fill(hidden, -torch.inf), impl="triton")
    grads = torch.autograd.grad(out.sum(), (q, k, v, bias))
    expected = attention(q, k, v, mask, bias=bias.masked_fill(hidden, -1e4), impl="reference")
    rows = torch.arange(40, device=q.device) >= 20
    seen = mask.dense(40)[0, 0][:, 20:].any(1) & rows
    for one, other in zip(
        grads, torch.autograd.grad(expected[:, :, seen].sum(), (q, k, v, bias)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_any_strides_give_the_same_bits():
    q, k, v, bias = place(*inputs(2, 2, 1, 40, 40, 16))
    mask = blocks(1, 1, 40, tile=16, block=8, seed=3).to(q.device)
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


def test_gradients_compile_to_one_graph():
    q, k, v, bias = (t.requires_grad_() for t in place(*inputs(1, 2, 1, 40, 40, 16)))
    mask = blocks(1, 1, 40, tile=16, block=8, seed=3).to(q.device)
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    results = []
    for run in (compiled, attention):
        out = run(q, k, v, mask, bias=bias, impl="triton")
        results.append(torch.autograd.grad(out.square().sum(), (q, k, v, bias)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_tiles_of_a_block_ascend():
    mask = blocks(2, 2, 201, tile=16, block=8, seed=1)
    shape = {"block": 8, "tile": 16, "q_len": 90, "k_len": 201}
    tiles, begin = block_tiles(mask.indices, mask.counts, **shape)
    for b, g in ((0, 0), (1, 1)):
        table = mask.table(6, 13, 201)[b, g]
        # A block in a tile's future has no key that a row sees.
        table &= torch.arange(26) * 8 < (torch.arange(6, 13)[:, None] + 1) * 16
        for n in range(26):
            listed = tiles[b, g, begin[b, g, n] : begin[b, g, n + 1]]
            assert listed.equal(table[:, n].nonzero().flatten().int() + 6)


def arguments(biased, grad):
    q, k, v, bias = place(*inputs(1, 2, 1, 10, 13, 16, biased=biased))
    mask = (blocks(1, 1, 13, tile=6, block=4) & padding((2, 13))).to(q.device)
    for t in (q, k, v, bias):
        if t is not None:
            t.requires_grad_(grad)
    expiry = backend.immortal(mask, 13)
    return q, k, v, bias, expiry, mask.indices, mask.counts, 4, 6, 0.25


@each_bias
def test_attention_passes_opcheck(biased):
    torch.library.opcheck(backend._attend, arguments(biased, grad=True))


@each_bias
def test_backward_passes_opcheck(biased):
    args = arguments(biased, grad=False)
    out, lse = backend._attend(*args)
    grads = torch.ones_like(out), torch.ones_like(lse) if biased else None
    torch.library.opcheck(backend._attend_backward, (*args, out, lse, *grads))
