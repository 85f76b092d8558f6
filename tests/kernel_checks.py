"""How the kernels for masks other than `Lifetimes` are held to the definition."""

import torch
from attention_cases import naive_attention, tensors


def check(
    attend, mask, q_len, k_len, *, device, shape=(2, 4, 2), dim=16, bias=False, dtype=torch.float32
):
    """Compare ``attend`` with eager attention in float64 under the mask's dense matrix.

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
