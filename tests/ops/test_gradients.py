import pytest
import torch
from attention_cases import padding, stripes, tensors
from features import lacks_kernels, needs
from kernel_cases import GPU, require_triton

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


@pytest.mark.parametrize("impl", ["reference", "sdpa", "cpu", "triton"])
def test_gradients_under_large_biases(impl):
    """The bound that `attention` names: beyond it a stored log-sum-exp is too coarse."""
    if impl == "triton":
        require_triton()
        needs(lacks_kernels)
    device = "cuda" if impl == "triton" and GPU else "cpu"
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
