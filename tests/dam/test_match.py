import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmask.dam import Settings, amplify, match, true_mask
from dynmask.masks import Stripes


def random_mask(heads, length, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return true_mask(torch.rand(heads, length, length, generator=generator), 1 - share)


def pool_of_patterns(length):
    """DAM's pattern pool: `[2 L, L, L]`, all verticals, then all diagonals."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    verticals = [(j == c) & (i >= c) for c in range(length)]
    diagonals = [(i - j) == r for r in range(length)]
    return torch.stack(verticals + diagonals)


@pytest.mark.parametrize("length", [2, 3, 17, 63, 65, 111])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_gamma_equals_the_materialised_pool(length, share):
    mask = random_mask(3, length, share)
    pool = pool_of_patterns(length)
    overlap = (mask[:, None] & pool).sum((-2, -1)).double()
    gamma = overlap / pool.sum((-2, -1))
    found = match(mask, 0.7, support=0)
    torch.testing.assert_close(found.gamma_columns, gamma[:, :length].float())
    torch.testing.assert_close(found.gamma_offsets, gamma[:, length:].float())
    for head in range(3):
        assert (
            found.columns[head].tolist() == (gamma[head, :length] >= 0.7).nonzero()[:, 0].tolist()
        )
        assert (
            found.offsets[head].tolist() == (gamma[head, length:] >= 0.7).nonzero()[:, 0].tolist()
        )


def test_gamma_on_a_view_that_is_not_contiguous():
    mask = random_mask(4, 21, 0.5)
    strided = torch.stack([mask, ~mask], 1)[::2, 0]
    want, got = match(mask[::2].clone(), 0.5), match(strided, 0.5)
    assert torch.equal(want.gamma_offsets, got.gamma_offsets)
    assert torch.equal(want.gamma_columns, got.gamma_columns)


def test_a_share_of_exactly_mu_matches():
    # Column 1 has 5 rows and 4 of them; in float32 arithmetic 4 / 5 may fall below 0.8.
    mask = torch.eye(6, dtype=torch.bool)[None].clone()
    mask[0, 1:5, 1] = True
    assert 1 in match(mask, 0.8).columns[0].tolist()
    assert 1 not in match(mask, 0.81).columns[0].tolist()


@settings(deadline=None, max_examples=30)
@given(
    length=st.integers(2, 40),
    mu=st.floats(0.01, 1),
    support=st.floats(0, 0.99),
    seed=st.integers(0, 99),
)
def test_matches_have_support_and_the_own_token(length, mu, support, seed):
    found = match(random_mask(2, length, 0.7, seed), mu, support=support)
    for positions in (*found.columns, *found.offsets):
        assert positions.dtype == torch.int64
        assert (positions.diff() > 0).all()
        assert all(length - k >= support * length for k in positions.tolist())
    assert all(offsets[0] == 0 for offsets in found.offsets)


@pytest.mark.parametrize("width", [1, 5, 19])
def test_a_window_leaves_no_columns_and_sinks_leave_no_offsets(width):
    length = 100
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    window = ((distance >= 0) & (distance < width))[None]
    sinks = true_mask((torch.arange(length) < width).float().expand(1, length, length), 0.5)
    far = match(torch.cat([window, sinks]), 0.8)
    assert far.columns[0].tolist() == []
    assert far.offsets[0].tolist() == list(range(width))
    assert far.columns[1].tolist() == list(range(width))
    assert far.offsets[1].tolist() == [0]
    # The paper's rule takes the last columns of a window for verticals, and so on.
    near = match(torch.cat([window, sinks]), 0.8, support=0)
    assert near.columns[0].tolist() == list(range(length - int(width / 0.8), length))
    assert length - 1 in near.offsets[1].tolist()


BAD = {
    "float": (torch.ones(1, 3, 3).tril(), 0.5, 0.25, "bool"),
    "shape": (torch.ones(1, 3, 4, dtype=torch.bool).tril(), 0.5, 0.25, r"\[H, L, L\]"),
    "future": (torch.ones(1, 3, 3, dtype=torch.bool), 0.5, 0.25, "causal"),
    "no-own-token": (torch.zeros(1, 3, 3, dtype=torch.bool), 0.5, 0.25, "own token"),
    "mu": (torch.ones(1, 3, 3, dtype=torch.bool).tril(), 0.0, 0.25, "mu=0.0"),
    "support": (torch.ones(1, 3, 3, dtype=torch.bool).tril(), 0.5, 1.0, "support=1.0"),
}


@pytest.mark.parametrize(("mask", "mu", "support", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(mask, mu, support, message):
    with pytest.raises(ValueError, match=message):
        match(mask, mu, support=support)


def extended_mask(mean, tau, mu, size, lam=0.5, eps=1e-10):
    """The paper's construction, pair by pair: true mask, matched patterns, extension to `size`."""
    length = mean.shape[-1]
    amplified = (mean.clamp_min(eps) ** lam - 1) / lam
    amplified = amplified - amplified.min()
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    true = ((amplified >= tau) & causal) | torch.eye(length, dtype=torch.bool)
    out = torch.eye(size, dtype=torch.bool).repeat(len(mean), 1, 1)
    for head in range(len(mean)):
        for k in range(length):
            column = true[head, k:, k].double().mean() >= mu
            offset = true[head].diagonal(-k).double().mean() >= mu
            for i in range(k, size):
                out[head, i, k] |= column
                out[head, i, i - k] |= offset
    out[:, :length, :length] |= true
    return out


@pytest.mark.parametrize("size", [17, 18, 63, 111])
@pytest.mark.parametrize("mu", [0.3, 0.8])
def test_stripes_equal_the_papers_extended_mask(size, mu):
    length, heads = 17, 4
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(heads, length, length, generator=generator) * 2
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    logits[0, :, :2] += 6  # sinks
    logits[1] += (distance < 4) * 6.0  # a window
    logits[2] += (distance == 5) * 6.0  # one diagonal
    mean = logits.masked_fill(distance < 0, -torch.inf).softmax(-1)
    chosen = Settings(capture_length=length, tau=0.3, mu=mu, support=0)
    corner = true_mask(amplify(mean, mean, chosen), chosen.tau)
    found = match(corner, mu, support=0)
    stripes = Stripes(
        columns=found.columns,
        offsets=found.offsets,
        full_heads=torch.zeros(heads, dtype=torch.bool),
        corner=corner,
    )
    want = extended_mask(mean, chosen.tau, mu, size)
    assert torch.equal(stripes.dense(size)[0], want)
    assert 0 < want.sum() < heads * size * (size + 1) // 2
