"""Inputs and checks for the GPU kernels, which without a GPU run small in Triton's interpreter."""

import os

import pytest
import torch
from attention_cases import lifetimes, naive_attention, naive_lifetimes, padding, tensors
from features import lacks_kernels, needs
from torch import Tensor

from dynmask.masks import Documents, Lifetimes
from dynmask.masks.lifetimes import NEVER
from dynmask.ops import attention

GPU = torch.cuda.is_available()

needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


def require_triton():
    """Skip the calling module where kernels can run neither on a GPU nor in the interpreter."""
    pytest.importorskip("triton")
    if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)


def device_of(impl):
    """Where a backend is tried; skips the test where it cannot run."""
    if impl != "triton":
        return "cpu"
    require_triton()
    needs(lacks_kernels)
    return "cuda" if GPU else "cpu"


# The interpreter multiplies no bfloat16.
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if GPU else [])]
# Dtypes and head sizes; the last ones are those of the kernels for Hopper.
KINDS = [(torch.float32, 16), *([(torch.float16, 64), (torch.bfloat16, 128)] if GPU else [])]
LENGTHS = [1, 63, 65, 111, 300, *([1000] if GPU else [])]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
each_kind = pytest.mark.parametrize(("dtype", "dim"), KINDS, ids=lambda x: str(x).split(".")[-1])
each_bias = pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])


def random_lifetimes(batch, groups, count, seed=0):
    """Any lifetimes: keys that no, few, many, or all later rows see; rows without keys."""
    g = torch.Generator().manual_seed(seed)
    shape = (batch, groups, count)
    slot = torch.arange(count).expand(shape)
    near = slot + torch.randint(0, 9, shape, generator=g)
    far = slot + torch.randint(0, count + 1, shape, generator=g)
    kind = torch.randint(4, shape, generator=g)
    expiry = torch.stack([slot, near, far, far]).gather(0, kind[None])[0]
    expiry = expiry.where(torch.rand(shape, generator=g) < 0.95, NEVER)
    # Nothing survives this slot, and the next ones are not seen: their rows are empty.
    gap = count // 3
    expiry = torch.where(slot < gap, expiry.clamp_max(gap), expiry)
    return Lifetimes(torch.where((slot >= gap) & (slot < gap + 2), slot, expiry).int())


def _scores(batch, groups, count, seed=0):
    return torch.randn(batch, groups, count, generator=torch.Generator().manual_seed(seed))


def _documents(batch, count):
    """Three documents a row; all keys of one expire at once."""
    cuts = torch.tensor([[count // 3 - b, count - 25 + 3 * b] for b in range(batch)])
    return Documents((torch.arange(count)[:, None] >= cuts[:, None]).sum(-1))


# By name: the mask over n keys for a batch of 2 and 2 kv heads. Where rows keep most keys, kernels
# have no lists and run over the whole prefix: "dense" here.
MASKS = {
    "keep 1": lambda n: lifetimes(2, 2, n, keep=1),
    "listed": lambda n: lifetimes(2, 2, n, keep=max(1, n // 5)),
    "dense": lambda n: lifetimes(2, 2, n, keep=max(1, 9 * n // 10)),
    "keep more than all": lambda n: lifetimes(2, 2, n, keep=n + 9),
    "one batch row": lambda n: lifetimes(1, 2, n, keep=max(1, n // 5)),
    "one head": lambda n: lifetimes(2, 1, n, keep=max(1, n // 5)),
    "one of both, dense": lambda n: lifetimes(1, 1, n, keep=max(1, 9 * n // 10)),
    "window": lambda n: Lifetimes.window(n, window=max(1, n // 7), sinks=3),
    "above": lambda n: Lifetimes.above(_scores(2, 2, n), 1.2),
    "above, dense": lambda n: Lifetimes.above(_scores(2, 2, n), -1.5),
    "padded": lambda n: (
        lifetimes(2, 2, n, keep=max(1, n // 5)) & padding((n // 9, n), (n // 4, n - n // 8))
    ),
    "all padding": lambda n: Lifetimes.top(
        _scores(2, 2, n), keep=max(1, n // 5), padding=padding((0, n - n // 40), (n // 20, n // 20))
    ),
    "padded, all kept": lambda n: lifetimes(1, 1, n, keep=n) & padding((n // 9, n), (0, n // 2)),
    "packed": lambda n: Lifetimes.top(
        _scores(2, 2, n), keep=max(1, n // 5), documents=_documents(2, n)
    ),
    "packed, all kept": lambda n: (
        Lifetimes(torch.full((1, 1, n), NEVER, dtype=torch.int32)) & _documents(2, n)
    ),
    "any": lambda n: random_lifetimes(2, 2, n),
    "nothing": lambda n: Lifetimes(torch.arange(n).int()[None, None], most=0),
}


def place(*given):
    """Put tensors where the kernels run."""
    return tuple(t if t is None else t.to("cuda" if GPU else "cpu") for t in given)


def inputs(batch, heads, groups, q_len, k_len, dim, *, dtype=torch.float32, biased=True, seed=0):
    """Return q, k, v and a bias that the dtype holds exactly, or None."""
    q, k, v = tensors(batch, heads, groups, q_len, k_len, dim, dtype=dtype, seed=seed)
    bias = _scores(batch, groups, k_len, seed + 1).to(dtype).float() if biased else None
    return q, k, v, bias


def seen_by_definition(mask, q, k):
    """``[B, H, Q, K]`` on q's device, pair by pair."""
    seen = naive_lifetimes(mask.to("cpu"), q.shape[2]).to(q.device)
    seen = seen.repeat_interleave(q.shape[1] // seen.shape[1], 1)
    return seen.expand(q.shape[0], -1, -1, k.shape[2])


def true_lse(q, k, seen, bias):
    """Return the log-sum-exp in float64, -inf where a row sees nothing."""
    ratio = q.shape[1] // k.shape[1]
    logits = q.double() @ k.double().repeat_interleave(ratio, 1).transpose(2, 3)
    logits = logits / q.shape[-1] ** 0.5
    if bias is not None:
        logits = logits + bias.double().repeat_interleave(ratio, 1)[:, :, None]
    return logits.masked_fill(~seen, -torch.inf).logsumexp(-1)


def assert_close_to_truth(got: Tensor, eager: Tensor, truth: Tensor, name: str = ""):
    """Hold an error to twice that of eager in the same dtype, and one rounding of the result."""
    assert got.isfinite().all(), name
    error = (got.double() - truth).abs().max()
    top = truth.abs().max()
    slack = top * torch.finfo(got.dtype).eps / 2
    # Gradients are sums of differences of larger numbers.
    slack = slack + 64 * torch.finfo(torch.float32).eps * top.clamp_min(1)
    assert error <= 2 * (eager.double() - truth).abs().max() + slack, name


def check(q, k, v, mask, bias=None, *, gradients=True, seen=None):
    """Hold output, log-sum-exp and the gradients in q, k, v and bias to float64's.

    Without gradients few rows go to the decode kernel. ``seen``: ``[B, H, Q, K]``, by definition
    if None.
    """
    q, k, v, bias = place(q, k, v, bias)
    mask = mask.to(q.device)
    asked = [t.detach().requires_grad_(gradients) for t in (q, k, v, bias) if t is not None]
    out, lse = attention(
        *asked[:3],
        mask,
        bias=None if bias is None else asked[3],
        impl="triton",
        return_lse=True,
    )
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    if seen is None:
        seen = seen_by_definition(mask, q, k)
    truth = naive_attention(q, k, v, seen, bias)
    assert_close_to_truth(out, naive_attention(q, k, v, seen, bias, dtype=q.dtype), truth)
    empty = ~seen.any(-1)
    assert (out[empty] == 0).all()
    assert torch.equal(lse == -torch.inf, empty)
    expected = true_lse(q, k, seen, bias)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)
    if not gradients:
        return

    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(5)).to(q)
    grad_lse = grad[..., 0].float()
    got = torch.autograd.grad([out, lse], asked, [grad, grad_lse])
    eager = naive_gradients(q, k, v, bias, seen, grad, q.dtype)
    truth = naive_gradients(q, k, v, bias, seen, grad, torch.float64)
    by_group = seen.unflatten(1, (k.shape[1], -1))
    unseen = ~by_group.any(dim=3).any(dim=2)
    for name, mine, theirs, true in zip("qkvb", got, eager, truth, strict=False):
        assert_close_to_truth(mine, theirs, true, f"gradient in {name}")
        zero = empty if name == "q" else unseen
        assert (mine[zero] == 0).all(), f"gradient in {name} where nothing is seen"


def naive_gradients(q, k, v, bias, seen, grad, dtype):
    """Gradients of ``sum(grad * out) + sum(grad[..., 0] * lse)`` by autograd.

    The log-sum-exp is float64 in any dtype, as no kernel has it in half precision.
    """
    # What an empty row gives is constant: let it see all keys, and ignore it.
    some = seen.any(-1)
    wider = seen | ~some[..., None]
    given = [t.detach() for t in (q, k, v, bias) if t is not None]
    low = [t.to(dtype).requires_grad_() for t in given]
    high = [t.double().requires_grad_() for t in given]
    low_bias, high_bias = (None, None) if bias is None else (low[3], high[3])
    out = naive_attention(*low[:3], wider, low_bias, dtype=dtype)
    lse = true_lse(*high[:2], wider, high_bias)
    of_out = torch.autograd.grad((out * grad.to(dtype) * some[..., None]).sum(), low)
    of_lse = torch.autograd.grad(
        (lse * grad[..., 0] * some).sum(), high, allow_unused=True, materialize_grads=True
    )
    return [a.double() + b for a, b in zip(of_out, of_lse, strict=True)]


def check_forward(
    attend, mask, q_len, k_len, *, device, shape=(2, 4, 2), dim=16, bias=False, dtype=torch.float32
):
    """Compare output and log-sum-exp with float64 eager attention under the mask's dense matrix.

    For kernels without a backward pass: ``attend(q, k, v, mask, bias, scale) -> (out, lse)``.

    ``shape`` is ``(B, H, G)``.
    """
    batch, heads, groups = shape
    q, k, v = tensors(batch, heads, groups, q_len, k_len, dim, dtype=dtype, seed=q_len)
    added = torch.randn(batch, groups, k_len) if bias else None
    ratio = heads // groups
    seen = mask.to("cpu").dense(q_len, k_len)
    if seen.shape[1] != heads:
        seen = seen.expand(-1, groups, -1, -1).repeat_interleave(ratio, 1)
    seen = seen.expand(batch, -1, -1, -1)
    logits = q.double() @ k.double().repeat_interleave(ratio, 1).transpose(2, 3) * dim**-0.5
    if added is not None:
        logits += added.double().repeat_interleave(ratio, 1)[:, :, None]
    # Heads behind tokens in memory, as projections leave them.
    moved = [t.transpose(1, 2).contiguous().transpose(1, 2).to(device) for t in (q, k, v)]
    moved_bias = None if added is None else added.to(device)
    out, lse = attend(*moved, mask.to(device), moved_bias, dim**-0.5)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    close = {"rtol": 2e-5, "atol": 5e-6} if dtype == torch.float32 else {"rtol": 0, "atol": 2e-3}
    expected = naive_attention(q, k, v, seen, added)
    torch.testing.assert_close(out.cpu().double(), expected, **close)
    expected = logits.masked_fill(~seen, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse.cpu().double(), expected, rtol=1e-5, atol=close["atol"])
    assert (out.cpu()[~seen.any(-1)] == 0).all()
