import pytest
import torch
from attention_cases import blocks, padding, stripes, tensors
from kernel_cases import device_of

from dynmask.masks import Lifetimes
from dynmask.ops import attention, reference


@pytest.mark.parametrize("cells", [1 << 24, 48], ids=["one-block", "recomputed-blocks"])
@pytest.mark.parametrize("q_len", [3, 6])
def test_reference_passes_gradcheck(monkeypatch, cells, q_len):
    monkeypatch.setattr(reference, "_CELLS", cells)
    q, k, v = tensors(2, 2, 1, q_len, 6, 2, dtype=torch.float64)
    bias = torch.randn(2, 1, 6, dtype=torch.float64)
    mask = stripes(2, 6, corner=3) & padding((2, 6), (0, 5))

    def run(q, k, v, bias):
        out, lse = attention(q, k, v, mask, bias=bias, impl="reference", return_lse=True)
        # No finite difference exists at -inf.
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(run, tuple(t.requires_grad_() for t in (q, k, v, bias)))


@pytest.mark.parametrize("impl", ["reference", "sdpa", "auto"])
def test_empty_rows_have_zero_gradients(impl):
    q, k, v = (t.requires_grad_() for t in tensors(2, 2, 1, 8, 8, 16))
    mask = stripes(2, 8) & padding((3, 8), (0, 0))
    attention(q, k, v, mask, impl=impl).square().sum().backward()
    for t in (q, k, v):
        assert t.grad.isfinite().all()
        assert (t.grad[0, :, :3] == 0).all()
        assert (t.grad[1] == 0).all()
        assert (t.grad[0, :, 3:] != 0).any()


@pytest.mark.parametrize("impl", ["sdpa", "auto"])
def test_gradients_agree_with_the_reference(impl):
    mask = stripes(4, 65, corner=9)
    grads = []
    for name in (impl, "reference"):
        inputs = [t.requires_grad_() for t in tensors(1, 4, 2, 65, 65, 16)]
        bias = torch.linspace(-1, 1, 130).view(1, 2, 65).requires_grad_()
        attention(*inputs, mask, bias=bias, impl=name).square().sum().backward()
        grads.append([t.grad for t in (*inputs, bias)])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def mask_of(kind):
    if kind == "lifetimes":
        return Lifetimes.window(70, window=9)
    return stripes(4, 70) if kind == "stripes" else blocks(1, 2, 70)


@pytest.mark.parametrize("loss", [torch.sum, torch.linalg.norm], ids=["linear", "norm"])
@pytest.mark.parametrize(
    ("impl", "kind"),
    [("cpu", "lifetimes"), *(("triton", kind) for kind in ("lifetimes", "stripes", "blocks"))],
)
def test_gradients_of_gradients_are_refused(impl, kind, loss):
    """Also where the incoming gradient is a constant, of which autograd would make no graph."""
    device = device_of(impl)
    inputs = [t.to(device).requires_grad_() for t in tensors(1, 4, 2, 70, 70, 16)]
    out = attention(*inputs, mask_of(kind).to(device), impl=impl)
    (gradient,) = torch.autograd.grad(loss(out), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match='pass impl="reference"'):
        (out.sum() + gradient.square().sum()).backward()


def test_the_reference_has_gradients_of_gradients():
    inputs = tuple(t.double().requires_grad_() for t in tensors(1, 2, 1, 5, 5, 2))
    mask = Lifetimes.window(5, window=3)
    assert torch.autograd.gradgradcheck(lambda *x: attention(*x, mask, impl="reference"), inputs)


@pytest.mark.parametrize("impl", ["reference", "sdpa", "cpu"])
def test_autocast_changes_nothing(impl):
    """Torch's own backward passes, of which the others' consist, are to be run outside of it."""
    mask, found = Lifetimes.window(70, window=9), []
    for enabled in (False, True):
        inputs = [t.requires_grad_() for t in tensors(1, 4, 2, 70, 70, 16)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = attention(*inputs, mask, impl=impl)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled and impl == "cpu"):
            out.square().sum().backward()
        found.append([out, *(t.grad for t in inputs)])
    for plain, cast in zip(*found, strict=True):
        assert cast.dtype == torch.float32
        torch.testing.assert_close(cast, plain)


@pytest.mark.parametrize("what", ["k", "v", "bias"])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_what_is_hidden_reaches_no_gradient(impl, what):
    names = dict(zip("qkv", tensors(1, 4, 2, 64, 64, 16), strict=True))
    names["bias"] = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(0))
    names[what][:, :, :10] = float("nan")
    q, k, v, bias = (t.requires_grad_() for t in names.values())
    mask = Lifetimes.window(64, window=8) & padding((10, 64))
    out = attention(q, k, v, mask, bias=bias, impl=impl)
    out.square().sum().backward()
    for t in (q, k, v, bias):
        assert t.grad[:, :, 10:].isfinite().all()
        assert (t.grad[:, :, :10] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", ["reference", "sdpa", "cpu"])
def test_a_bias_is_as_exact_as_it_was_given(impl, dtype):
    """Of a bias near 148 bfloat16 has steps of 1."""
    mask = Lifetimes.window(130, window=40)
    inputs = tensors(1, 4, 2, 130, 130, 16, dtype=dtype)
    bias = 148 - torch.rand(1, 2, 130, generator=torch.Generator().manual_seed(0))
    exact = attention(*(t.double() for t in inputs), mask, bias=bias.double(), impl="reference")
    got = attention(*inputs, mask, bias=bias, impl=impl)
    torch.testing.assert_close(got.double(), exact, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("impl", ["reference", "sdpa", "cpu", "triton"])
def test_gradients_under_large_biases(impl):
    """The bound that `attention` names: beyond it a stored log-sum-exp is too coarse."""
    device = device_of(impl)
    inputs = tensors(1, 4, 2, 130, 130, 16)
    bias = torch.rand(1, 2, 130, generator=torch.Generator().manual_seed(0))
    bias[:, 0, 17], bias[:, 0, 60], bias[:, 1, 5] = 7.3e3, 3.1e3, 1e4

    def gradients(impl, **to):
        leaves = [x.detach().to(**to).requires_grad_() for x in (*inputs, bias)]
        mask = Lifetimes.top(leaves[3].detach(), keep=37)
        out = attention(*leaves[:3], mask, bias=leaves[3], impl=impl)
        return torch.autograd.grad(out.square().sum(), leaves)

    exact = gradients("reference", dtype=torch.float64)
    for found, right in zip(gradients(impl, device=device), exact, strict=True):
        assert (found.cpu() - right).norm() < 1e-3 * right.norm()
