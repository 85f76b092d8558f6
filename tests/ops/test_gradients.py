import pytest
import torch
from attention_cases import padding, stripes, tensors

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
