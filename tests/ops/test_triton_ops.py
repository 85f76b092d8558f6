"""The kernels as torch operators: schemas, fake results, gradients, compilation, support."""

import pytest
import torch
from attention_cases import lifetimes
from kernel_cases import GPU, MASKS, inputs, needs_gpu, place, require_triton

from dynmask.masks import Lifetimes
from dynmask.ops import attention, choose, supports

require_triton()

from dynmask.masks.triton.select import expiry_of_top  # noqa: E402
from dynmask.ops.triton import operators, prepare  # noqa: E402


def arguments(keep, *, q_len=20, biased=True, grad=True):
    """What `operators.attend` takes."""
    q, k, v, bias = place(*inputs(1, 2, 1, q_len, 25, 16, biased=biased))
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    mask = lifetimes(1, 1, 25, keep=keep).to(q.device)
    lists, most = prepare(mask, q_len, 25)
    for t in (q, k, v, bias):
        if t is not None:
            t.requires_grad_(grad)
    return q, k, v, bias, mask.expiry, lists, most, 0.25, keep >= 25


each_keep = pytest.mark.parametrize("keep", [5, 20, 25], ids=["listed", "dense", "immortal"])
each_bias = pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])


@pytest.mark.usefixtures("poisoned")
def test_schedule_passes_opcheck():
    # Lists have room that nothing is written to, and that is compared too.
    (expiry,) = place(MASKS["any"](300).expiry)
    torch.library.opcheck(operators.schedule, (expiry, 200, 100))


@each_bias
@each_keep
def test_attention_passes_opcheck(keep, biased):
    torch.library.opcheck(operators.attend, arguments(keep, biased=biased))


@each_bias
@each_keep
def test_backward_passes_opcheck(keep, biased):
    args = arguments(keep, biased=biased, grad=False)
    out, lse = operators.attend(*args)
    grads = torch.ones_like(out), torch.ones_like(lse) if biased else None
    torch.library.opcheck(operators.attend_backward, (*args, out, lse, *grads))


@each_bias
@pytest.mark.parametrize("keep", [5, 25], ids=["", "immortal"])
def test_decode_passes_opcheck(keep, biased):
    q, k, v, bias, expiry, _, _, scale, immortal = arguments(
        keep, q_len=3, biased=biased, grad=False
    )
    torch.library.opcheck(operators.attend_decode, (q, k, v, bias, expiry, scale, immortal))


@pytest.mark.parametrize("segments", [False, True], ids=["", "segments"])
def test_selection_passes_opcheck(segments):
    score, segment = place(torch.randn(2, 2, 70), torch.arange(140).view(2, 70).int() // 9)
    torch.library.opcheck(expiry_of_top, (score, 8, segment if segments else None))


MAKERS = {
    "window": lambda score: Lifetimes.window(
        score.shape[2], window=20, sinks=2, device=score.device
    ),
    # The torch path of the selection has as many steps as the length has bits.
    **({"top": lambda score: Lifetimes.top(score, keep=20)} if GPU else {}),
}
BACKENDS = ["aot_eager", *(["inductor"] if GPU else [])]


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_one_graph_for_all_lengths(backend, maker, grad):
    def run(q, k, v, score):
        mask = MAKERS[maker](score)
        return attention(q, k, v, mask, bias=score, impl="triton")

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    # The second length tells that lengths change; the third must not compile again.
    for count in (130, 140, 150):
        q, k, v, score = place(*inputs(1, 4, 2, count, count, 16))
        asked = [t.requires_grad_(grad) for t in (q, k, v, score)]
        with torch._dynamo.config.patch(error_on_recompile=count == 150):
            got = compiled(q, k, v, score)
        expected = run(q, k, v, score)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        if grad:
            mine = torch.autograd.grad(got.square().sum(), asked)
            for one, two in zip(
                mine, torch.autograd.grad(expected.square().sum(), asked), strict=True
            ):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_compiles_to_one_graph(backend):
    def run(q, k, v, score):
        return attention(q, k, v, Lifetimes.top(score, keep=20), bias=score, impl="triton")

    q, k, v, score = place(*inputs(1, 4, 2, 2, 150, 16))
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, score), run(q, k, v, score))


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_mask_made_outside_is_an_input():
    q, k, v, bias = place(*inputs(1, 4, 2, 150, 150, 16))
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        score = torch.randn(1, 2, 150, generator=torch.Generator().manual_seed(seed))
        mask = Lifetimes.top(score.to(q.device), keep=20)
        got = compiled(q, k, v, mask, bias=bias, impl="triton")
        torch.testing.assert_close(got, attention(q, k, v, mask, bias=bias, impl="triton"))


def test_lists_are_made_once_a_mask(monkeypatch):
    made = []
    schedule = operators.schedule
    monkeypatch.setattr(operators, "schedule", lambda *args: made.append(args) or schedule(*args))
    q, k, v, _ = place(*inputs(1, 2, 2, 140, 140, 16))
    mask = Lifetimes.window(140, window=20).to(q.device)
    for _ in range(2):
        attention(q, k, v, mask, impl="triton")
    assert len(made) == 1
    attention(q[:, :, 70:], k, v, mask, impl="triton")
    assert len(made) == 2


SHOWN = torch.zeros(1, 2, 8, 16)


@pytest.mark.parametrize(
    ("q", "mask", "reason"),
    [
        (SHOWN.double(), Lifetimes.window(8, window=2), "not torch.float64"),
        (SHOWN.repeat(1, 1, 1, 17), Lifetimes.window(8, window=2), "up to 256, not 272"),
        (SHOWN.to("meta"), Lifetimes.window(8, window=2), "on meta"),
    ],
    ids=["float64", "head size", "device"],
)
def test_what_the_kernels_do_not_run(q, mask, reason):
    if q.device.type != "meta":
        (q,) = place(q)
    assert reason in supports("triton", q, q, q, mask)
    if q.device.type != "meta":
        with pytest.raises(ValueError, match=reason):
            attention(q, q, q, mask.to(q.device), impl="triton")


def test_they_run_the_rest():
    (q,) = place(SHOWN)
    for mask in (Lifetimes.window(8, window=2), Lifetimes.above(SHOWN[..., 0], 0.0)):
        assert supports("triton", q, q, q, mask.to(q.device)) is None


@pytest.mark.skipif(GPU, reason="a GPU multiplies bfloat16")
def test_the_interpreter_does_not_multiply_bfloat16():
    q = SHOWN.bfloat16()
    assert "interpreter" in supports("triton", q, q, q, Lifetimes.window(8, window=2))


@needs_gpu
def test_auto_takes_the_kernels_on_a_gpu():
    q = SHOWN.cuda()
    assert choose(q, q, q, Lifetimes.window(8, window=2).to(q.device)) == "triton"
    assert choose(q, q, q) == "sdpa"
