"""MoBA against a dense definition."""

import pytest
import torch

from dynmask.baselines.moba import MixtureOfBlockAttention, moba_blocks
from dynmask.baselines.trainable import rotate


def draw(heads, groups, length, *, seed=0, dim=8):
    torch.manual_seed(seed)
    made = [torch.randn(2, h, length, dim, dtype=torch.float64) for h in (heads, groups, groups)]
    return made[0], made[1], made[2]


def dense(q, k, block, top):
    """``[B, H, N, N]`` bool: the own block, and those before it whose mean key fits best."""
    length = q.shape[2]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    seen = torch.zeros(*q.shape[:2], length, length, dtype=torch.bool)
    for i in range(length):
        own = i // block
        scores = [
            (q[:, :, i] * k[:, :, b * block : (b + 1) * block].mean(2)).sum(-1) for b in range(own)
        ]
        seen[:, :, i, own * block : i + 1] = True
        if not scores:
            continue
        order = torch.stack(scores, -1).argsort(-1, descending=True)[..., : top - 1]
        for place in order.unbind(-1):
            for b in range(own):
                seen[:, :, i, b * block : (b + 1) * block] |= (place == b)[..., None]
    return seen


SHAPES = [
    pytest.param(4, 2, 53, 8, 3, id="gqa"),
    pytest.param(3, 3, 64, 7, 2, id="mha"),
    pytest.param(2, 1, 5, 8, 3, id="one-block"),
    pytest.param(2, 2, 40, 5, 1, id="own-block"),
    pytest.param(2, 2, 24, 5, 99, id="all"),
    pytest.param(2, 2, 1, 4, 2, id="one-token"),
]


@pytest.mark.parametrize(("heads", "groups", "length", "block", "top"), SHAPES)
def test_blocks(heads, groups, length, block, top):
    q, k, _ = draw(heads, groups, length)
    expected = dense(q, k, block, top)
    assert torch.equal(moba_blocks(q, k, block=block, top=top).dense(length), expected)
    for rows in {1, min(13, length)}:  # of a chunk, and of decoding
        mask = moba_blocks(q[:, :, -rows:], k, block=block, top=top)
        assert torch.equal(mask.dense(rows, length), expected[:, :, -rows:])


def definition(layer, x, angles):
    """The whole layer over a dense mask, by torch's autograd."""
    q, k, v = (
        p(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    q, k = rotate(q, angles), rotate(k, angles)
    seen = dense(q, k, layer.block, layer.top)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    p = (q @ k.mT / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    return layer.o_proj((p @ v).transpose(1, 2).flatten(2))


def test_layer_and_gradients():
    torch.manual_seed(0)
    layer = MixtureOfBlockAttention(12, heads=4, groups=2, dim=8, block=6, top=3).double()
    x = torch.randn(2, 47, 12, dtype=torch.float64, requires_grad=True)
    turns = torch.randn(1, 47, 4, dtype=torch.float64).repeat(1, 1, 2)
    angles = turns.cos(), turns.sin()
    leaves = [x, *layer.parameters()]
    factor = torch.randn(2, 47, 12, dtype=torch.float64)
    out, expected = layer(x, position_embeddings=angles), definition(layer, x, angles)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad((out * factor).sum(), leaves)
    wanted = torch.autograd.grad((expected * factor).sum(), leaves)
    for ours, theirs in zip(grads, wanted, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("changes", [{"block": 0}, {"top": 0}])
def test_wrong_settings(changes):
    with pytest.raises(ValueError, match="block >= 1 and top >= 1"):
        MixtureOfBlockAttention(12, heads=2, groups=2, dim=8, **changes)
