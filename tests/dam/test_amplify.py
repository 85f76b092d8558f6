import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmask.dam import AMPLIFIERS, Settings, amplify, true_mask

TEXTS = 6


def maps(heads=3, length=9, seed=0):
    """Mean maps as a model gives them: causal, rows that sum to 1."""
    logits = torch.randn(heads, length, length, generator=torch.Generator().manual_seed(seed)) * 3
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -math.inf).softmax(-1)


def of_pairs(function, mean):
    """Apply a function of the list of a map's causal pairs, head by head, in float64."""
    out = np.zeros(mean.shape)
    lower = np.tri(mean.shape[-1], dtype=bool)
    for head in range(len(mean)):
        out[head][lower] = function(mean[head].double().numpy()[lower])
    return out


def box_cox(x, lam, eps):
    x = np.maximum(x, eps)
    return np.log(x) if lam == 0 else (x**lam - 1) / lam


FORMULAS = {
    "box-cox": lambda x: box_cox(x, 0.5, 1e-10) - box_cox(0, 0.5, 1e-10),
    "mean": lambda x: x,
    "sum": lambda x: TEXTS * x,
    "log": lambda x: np.log(np.maximum(x, 1e-10)) - np.log(1e-10),
    "sqrt": np.sqrt,
    "yeo-johnson": lambda x: ((x + 1) ** 0.5 - 1) / 0.5,
    "z-score": lambda x: (x - x.mean()) / x.std(),
    "min-max": lambda x: (x - x.min()) / (x.max() - x.min()),
    "arcsinh": np.arcsinh,
}


def test_every_amplifier_has_a_formula_here():
    assert set(FORMULAS) == set(AMPLIFIERS)


@pytest.mark.parametrize("length", [2, 9, 63])
@pytest.mark.parametrize("name", FORMULAS)
def test_amplifier_is_its_formula(name, length):
    mean = maps(length=length)
    before = mean.clone()
    got = amplify(mean, mean * TEXTS, Settings(amplify=name, tau=0.1))
    np.testing.assert_allclose(got, of_pairs(FORMULAS[name], mean), rtol=2e-5, atol=2e-6)
    assert got.dtype == torch.float32
    assert torch.equal(mean, before)
    low, high = AMPLIFIERS[name].bounds(0.5, 1e-10)
    assert low <= got.min() + 1e-6
    assert got.max() <= high + 1e-5


@pytest.mark.parametrize("name", ["z-score", "min-max"])
def test_pairs_above_the_diagonal_do_not_count(name):
    mean = maps()
    other = mean + torch.rand(mean.shape).triu(1)
    settings = Settings(amplify=name)
    torch.testing.assert_close(amplify(other, other, settings), amplify(mean, mean, settings))


@pytest.mark.parametrize("name", ["z-score", "min-max"])
def test_a_constant_map_is_finite(name):
    flat = torch.full((1, 5, 5), 0.25)
    assert amplify(flat, flat, Settings(amplify=name)).isfinite().all()


@settings(deadline=None, max_examples=30)
@given(lam=st.just(0.0) | st.floats(0.01, 2), eps=st.sampled_from([1e-30, 1e-10, 1e-3]))
def test_box_cox_facts(lam, eps):
    chosen = Settings(lam=lam, eps=eps, tau=1e-3)
    mean = maps()
    mean[0, -1, 0] = 0
    got = amplify(mean, mean, chosen)
    _, high = AMPLIFIERS["box-cox"].bounds(lam, eps)
    assert 0 <= got[0, -1, 0] < 1e-4, "a pair that is never seen has the map's minimum, 0"
    assert got[0, 0, 0] == pytest.approx(high, rel=1e-4), "row 0 sees itself alone"
    want = of_pairs(lambda x: box_cox(x, lam, eps) - box_cox(0, lam, eps), mean)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    order = mean.tril().flatten().argsort()
    assert (got.flatten()[order].diff() >= -1e-4).all(), "monotone but for rounding"


def test_box_cox_at_the_papers_setting_reaches_2():
    mean = maps()
    assert amplify(mean, mean, Settings()).max() == pytest.approx(2.0, abs=1e-4)


def test_tau_means_the_same_probability_in_every_map():
    # lam 0.5: B >= tau exactly where the probability is >= (tau / 2 + sqrt(eps))^2.
    edge = (0.1 / 2 + 1e-5) ** 2
    mean = torch.zeros(2, 3, 3)
    mean[0, 2] = torch.tensor([edge * 0.999, edge * 1.001, 0.9])
    mean[1, 2] = torch.tensor([edge * 1.001, edge * 0.999, 1e-6])
    mask = true_mask(amplify(mean, mean, Settings()), 0.1)
    assert mask[0, 2].tolist() == [False, True, True]
    assert mask[1, 2].tolist() == [True, False, True], "the own token is forced"


@pytest.mark.parametrize("name", FORMULAS)
def test_true_mask_is_causal_whatever_the_values(name):
    mean = maps(length=11)
    for tau in (-5.0, 0.0, 0.1):
        mask = true_mask(amplify(mean, mean, Settings(amplify=name)), tau)
        assert not mask.triu(1).any()
        assert mask.diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("which", ["mean", "total"])
def test_a_map_that_is_not_finite_is_named(value, which):
    given_maps = {"mean": maps(), "total": maps()}
    given_maps[which][1, 4, 2] = value
    with pytest.raises(ValueError, match=r"layer 7, head 9 \(1 of 3 heads\).*NaN"):
        amplify(**given_maps, settings=Settings(), layer=7, first_head=8)


@pytest.mark.parametrize("value", [-0.1, 1.5], ids=str)
def test_values_that_are_no_probabilities_are_refused(value):
    mean = maps()
    mean[2, 4, 2] = value
    with pytest.raises(ValueError, match=r"head 2.*probabilities"):
        amplify(mean, mean, Settings())


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\[H, L, L\]"):
        amplify(maps(length=4), maps(length=5), Settings())
