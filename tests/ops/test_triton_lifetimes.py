"""The gathering kernels, forward and backward, against naive attention in float64."""

import pytest
import torch
from attention_cases import lifetimes
from kernel_cases import (
    DTYPES,
    GPU,
    LENGTHS,
    MASKS,
    assert_close_to_truth,
    check,
    each_bias,
    each_dtype,
    each_kind,
    inputs,
    place,
    random_lifetimes,
    require_triton,
)

from dynmask.masks import Documents, Lifetimes
from dynmask.ops import attention

require_triton()

from dynmask.masks.triton import schedule, spans  # noqa: E402
from dynmask.ops.triton import backward, common, operators  # noqa: E402
from dynmask.ops.triton import lifetimes as ways  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned", "short_spans")


@pytest.fixture
def short_spans(monkeypatch):
    """Let short inputs have several spans, not all of them at once."""
    for module in (spans, backward):
        monkeypatch.setattr(module, "SPAN", 128)
    monkeypatch.setattr(backward, "_PART_ELEMENTS", 40_000)


@pytest.fixture
def usual_spans(short_spans, monkeypatch):
    monkeypatch.undo()


def case(q_len, k_len, kind, *, heads=4 if GPU else 2, dim=16, biased=True, dtype=torch.float32):
    q, k, v, bias = inputs(2, heads, 2, q_len, k_len, dim, dtype=dtype, biased=biased)
    return q, k, v, MASKS[kind](k_len), bias


def placed(q, k, v, mask, bias):
    q, k, v, bias = place(q, k, v, bias)
    return q, k, v, mask.to(q.device), bias


@each_bias
@each_kind
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind, dtype, dim, biased):
    if not biased and kind not in ("listed", "dense", "any") and not GPU:
        pytest.skip("too long for the interpreter")
    check(*case(140, 140, kind, biased=biased, dim=dim, dtype=dtype))


@each_kind
@pytest.mark.parametrize("q_len", [1, 30, 129], ids=lambda n: f"q{n}")
@pytest.mark.parametrize("kind", ["listed", "dense", "any", "packed, all kept"])
def test_fewer_rows_than_keys(kind, q_len, dtype, dim):
    check(*case(q_len, 270, kind, dim=dim, dtype=dtype))


@each_dtype
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length, dtype):
    check(*case(length, length, "listed", dim=64 if GPU else 16, dtype=dtype))


@each_dtype
@pytest.mark.parametrize("dim", [1, 16, 31, 64, 80, 128, 256])
def test_head_sizes(dim, dtype):
    q, k, v, bias = inputs(1, 2, 1, 100, 135, dim, dtype=dtype)
    check(q, k, v, Lifetimes.top(torch.randn(1, 1, 135), keep=40), bias)


@each_dtype
@pytest.mark.parametrize("ratio", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("keep", [30, 140], ids=["listed", "dense"])
def test_group_ratios(keep, ratio, dtype):
    q, k, v, bias = inputs(1, 2 * ratio, 2, 45, 150, 64 if GPU else 16, dtype=dtype)
    check(q, k, v, lifetimes(1, 2, 150, keep=keep), bias)


def tokens_first(t):
    """The same values as ``[B, N, H, D]`` lie in memory."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def fused(q, k, v):
    """Views of one ``[B, N, H + 2 G, D]``."""
    whole = tokens_first(torch.cat([q, k, v], 1))
    return whole.split([q.shape[1], k.shape[1], v.shape[1]], 1)


def in_a_cache(t, room):
    """The first slots of a longer cache, in which nothing else may be read."""
    return torch.nn.functional.pad(t, (0, 0, 0, room), value=torch.nan)[:, :, :-room]


LAYOUTS = {
    "tokens first": lambda q, k, v: (tokens_first(q), tokens_first(k), tokens_first(v)),
    "fused": fused,
    "dim not innermost": lambda *qkv: tuple(t.mT.contiguous().mT for t in qkv),
    "in a cache": lambda q, k, v: (q, in_a_cache(k, 40), in_a_cache(v, 24)),
    "one for the batch": lambda *qkv: tuple(t[:1].expand(2, -1, -1, -1) for t in qkv),
}


@each_kind
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, dim):
    q, k, v, mask, bias = placed(*case(130, 130, "listed", dim=dim, dtype=dtype))
    check(*LAYOUTS[layout](q, k, v), mask, bias)


def test_strides_of_bias_and_expiry():
    q, k, v, mask, bias = placed(*case(130, 130, "listed"))
    strided = Lifetimes(mask.expiry.permute(2, 0, 1).contiguous().permute(1, 2, 0), mask.most)
    check(q, k, v, strided, bias.mT.contiguous().mT)
    check(q, k, v, strided, bias[:, :1].expand(-1, 2, -1))


def test_scale():
    q, k, v, mask, bias = placed(*case(130, 130, "listed"))
    asked = [t.requires_grad_() for t in (q, k, v)]

    def run(impl, q, scale):
        out = attention(q, k, v, mask, bias=bias, scale=scale, impl=impl)
        return out, *torch.autograd.grad(out.square().sum(), asked)

    for got, expected in zip(run("triton", q, 0.7), run("reference", q * 2.8, 0.25), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("before", [1, 7, 31, 40])
@pytest.mark.parametrize("kind", ["all die", "one lives"])
@each_kind
def test_many_keys_that_expire_just_before_the_first_row(before, kind, dtype, dim):
    # Whole blocks of keys that live in the span of the first row, yet at no row.
    count, rows = 290, 20
    first = count - rows
    expiry = torch.full((1, 1, count), first - before, dtype=torch.int32)
    expiry[..., first - before :] = count
    if kind == "one lives":
        expiry[..., 3] = count
    q, k, v, bias = inputs(1, 2, 1, rows, count, dim, dtype=dtype)
    check(q, k, v, Lifetimes(expiry), bias)


@pytest.mark.usefixtures("usual_spans")
def test_one_span():
    check(*case(140, 140, "listed"))


@pytest.mark.parametrize("dtype", DTYPES if GPU else DTYPES[:1], ids=str)
def test_the_result_does_not_depend_on_spans_at_once(dtype, monkeypatch):
    q, k, v, mask, bias = placed(*case(270, 270, "listed", dim=64, dtype=dtype))
    asked = [t.requires_grad_() for t in (q, k, v, bias)]

    def run():
        # A new mask, so that the lists are made again.
        again = Lifetimes(mask.expiry.clone(), mask.most)
        out, lse = attention(q, k, v, again, bias=bias, impl="triton", return_lse=True)
        return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), asked)]

    first = run()
    for elements in (1, 1 << 30):
        monkeypatch.setattr(backward, "_PART_ELEMENTS", elements)
        for one, two in zip(first, run(), strict=True):
            assert torch.equal(one, two)


def test_gradients_through_the_log_sum_exp_alone():
    q, k, v, mask, bias = placed(*case(130, 130, "listed"))
    asked = [t.requires_grad_() for t in (q, k, v, bias)]

    def gradients(impl):
        _, lse = attention(q, k, v, mask, bias=bias, impl=impl, return_lse=True)
        return torch.autograd.grad(lse.cos().sum(), asked, materialize_grads=True)

    for got, expected in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asked", ["q", "k", "v", "bias"])
def test_gradients_in_one_input_only(asked):
    q, k, v, mask, bias = placed(*case(130, 130, "listed"))
    given = {"q": q, "k": k, "v": v, "bias": bias}
    given[asked].requires_grad_()

    def gradient(impl):
        out = attention(q, k, v, mask, bias=bias, impl=impl)
        # The gradient of a sum is expanded: its strides are 0.
        return torch.autograd.grad(out.sum(), given[asked])[0]

    torch.testing.assert_close(gradient("triton"), gradient("reference"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["window", "any", "packed, all kept"])
@each_kind
def test_bias_of_minus_infinity_hides_keys(kind, dtype, dim):
    q, k, v, mask, bias = placed(*case(130, 130, kind, dim=dim, dtype=dtype))
    bias[..., 5:70] = -torch.inf
    bias[1] = -torch.inf
    asked = [t.requires_grad_() for t in (q, k, v, bias)]

    def run(impl):
        out, lse = attention(q, k, v, mask, bias=bias, impl=impl, return_lse=True)
        return out, lse, *torch.autograd.grad(out.float().square().sum(), asked)

    # The output's rounding enters the gradients through rowsum(dO * O), as in every flash kernel.
    atol = {torch.float32: 1e-5, torch.float16: 0.05, torch.bfloat16: 0.4}[dtype]
    close = {"rtol": 1e-4 if dtype == torch.float32 else 0.05, "atol": atol}
    for got, expected in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(got, expected, **close)
        assert got.isnan().sum() == 0
    for gradient in run("triton")[3:]:
        assert (gradient[:, :, 5:70] == 0).all()
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("most", [60, 139, None], ids=lambda m: f"most {m}")
def test_any_bound_on_the_keys_of_a_row(most):
    q, k, v, mask, bias = case(140, 140, "listed")
    check(q, k, v, Lifetimes(mask.expiry, most), bias)


def test_one_mask_for_several_lengths_of_q():
    mask = random_lifetimes(2, 2, 150)
    for q_len in (130, 20, 130):
        q, k, v, bias = inputs(2, 2, 2, q_len, 150, 16, seed=q_len)
        check(q, k, v, mask, bias)


@pytest.mark.parametrize("kind", ["listed", "packed", "window"])
def test_long_lists_are_made_for_a_part_of_the_rows(kind, monkeypatch):
    made = []
    schedule = operators.schedule
    monkeypatch.setattr(operators, "schedule", lambda *args: made.append(args) or schedule(*args))
    monkeypatch.setattr(ways, "_LIST_BYTES", 1)
    check(*case(270, 290, kind))
    assert len(made) > 2


def test_the_masks_reach_both_ways_to_run():
    for kind, listed in (("listed", True), ("dense", False), ("keep more than all", False)):
        assert schedule.is_listed(140, min(MASKS[kind](140).most, 140)) == listed


@pytest.mark.skipif(not GPU, reason="too long for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("q_len", [700, 5000], ids=lambda n: f"q{n}")
@pytest.mark.parametrize("kind", ["listed", "dense", "packed"])
@pytest.mark.usefixtures("usual_spans")
def test_several_coarse_lists_and_spans(kind, q_len, dim, dtype):
    # Beyond 4096 slots, where the next coarse list and the next span of the usual length begin.
    score = torch.randn(1, 1, 5000, generator=torch.Generator().manual_seed(3)).cuda()
    documents = Documents((torch.arange(5000).cuda() // 1777)[None]) if kind == "packed" else None
    mask = Lifetimes.top(score, keep=4500 if kind == "dense" else 700, documents=documents)
    q, k, v, bias = inputs(1, 2, 1, q_len, 5000, dim, dtype=dtype)
    # The mask itself was held to the definition at short lengths.
    check(q, k, v, mask, bias, seen=mask.dense(q_len).expand(-1, 2, -1, -1))


def run(q, k, v, mask, bias, impl):
    """Output, log-sum-exp and gradients."""
    asked = [t.detach().requires_grad_() for t in (q, k, v, bias)]
    out, lse = attention(*asked[:3], mask, bias=asked[3], impl=impl, return_lse=True)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(5)).to(out)
    return out, lse, *torch.autograd.grad([out, lse], asked, [grad, torch.ones_like(lse)])


def run_exactly(q, k, v, mask, bias):
    return run(q.double(), k.double(), v.double(), mask, bias.double(), "reference")


@pytest.mark.skipif(not GPU, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("ratio", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("kind", ["listed", "dense", "packed", "padded"])
def test_hopper_kernels_are_as_good_as_the_portable_ones(monkeypatch, kind, ratio, dim, dtype):
    q, k, v, mask, bias = placed(*case(601, 777, kind, heads=2 * ratio, dim=dim, dtype=dtype))
    if not common.on_hopper(q):
        pytest.skip("needs a Hopper GPU")
    got = run(q, k, v, mask, bias, "triton")
    for module in (operators, backward):
        monkeypatch.setattr(module, "on_hopper", lambda q: False)
    portable = run(q, k, v, mask, bias, "triton")
    truth = run_exactly(q, k, v, mask, bias)
    for mine, theirs, true in zip(got, portable, truth, strict=True):
        empty = true == -torch.inf
        assert torch.equal(mine == -torch.inf, empty)
        assert_close_to_truth(*(t.masked_fill(empty, 0) for t in (mine, theirs, true)))
