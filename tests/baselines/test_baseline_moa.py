"""MoA's masks pair by pair, and its choice of spans against trying all of them."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dynmask.baselines.moa import MoA
from dynmask.baselines.moa_spans import choose_rules, span_at, span_density
from dynmask.masks import Stripes
from dynmask.ops import attention

ALPHA = ((4.0, -10.0, 0.0, 20.0), (200.0, 300.0, 150.0, 1e4))
BETA = ((0.0, 0.5, 0.29, 0.25), (0.0, 0.0, 1.0, 0.5))


def inputs(batch, heads, groups, q_len, k_len):
    torch.manual_seed(q_len * 1000 + k_len)
    q = torch.randn(batch, heads, q_len, 16, dtype=torch.float64)
    k, v = (torch.randn(batch, groups, k_len, 16, dtype=torch.float64) for _ in range(2))
    return q, k, v


def reference(alpha, beta, sinks, q_len, k_len):
    """``[1, H, Q, K]``, pair by pair."""
    out = torch.zeros(1, len(alpha), q_len, k_len, dtype=torch.bool)
    for h, (a, b) in enumerate(zip(alpha, beta, strict=True)):
        window = max(1, math.floor(round(a + b * k_len, 6)) - sinks)
        for row in range(q_len):
            i = k_len - q_len + row
            for j in range(i + 1):
                out[0, h, row, j] = j < sinks or i - j < window
    return out


@pytest.mark.parametrize("sinks", [0, 5])
@pytest.mark.parametrize(
    ("batch", "groups", "q_len", "k_len"),
    [(1, 4, 65, 65), (2, 2, 111, 111), (1, 1, 40, 100), (2, 2, 1, 77), (1, 1, 3, 3)],
    ids=["Q65", "B2-G2-Q111", "G1-Q40-K100", "B2-G2-Q1-K77", "Q3"],
)
def test_matches_the_definition(batch, groups, q_len, k_len, sinks):
    q, k, v = inputs(batch, 4, groups, q_len, k_len)
    selector = MoA(ALPHA, BETA, sinks).selector(0, 2)
    mask = selector.choose(q, k, None, scale=0.3)[0]
    expected = reference(ALPHA[0], BETA[0], sinks, q_len, k_len)
    if mask is None:
        assert expected.equal(torch.ones_like(expected).tril(k_len - q_len))
        return
    seen = mask.dense(q_len, k_len)
    assert seen.equal(expected)
    own = torch.arange(q_len)
    assert seen[..., own, own + k_len - q_len].all()
    ideal = scaled_dot_product_attention(q, k, v, attn_mask=expected, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, mask, scale=0.3), ideal)


def test_a_row_sees_what_the_last_row_of_a_prefill_sees():
    selector = MoA(ALPHA, BETA, 3).selector(0, 2)
    q, k, _ = inputs(1, 4, 2, 80, 80)
    seen = selector.mask(q[:, :, :50], k[:, :, :50], scale=1.0).dense(50)
    for end in range(51, 62):
        row = selector.mask(q[:, :, end - 1 : end], k[:, :, :end], scale=1.0).dense(1, end)
        whole = MoA(ALPHA, BETA, 3).selector(0, 2).mask(q[:, :, :end], k[:, :, :end], scale=1.0)
        assert row.equal(whole.dense(end)[:, :, -1:])
        # What the row before did not see, this one does not see either.
        assert not (row[..., : end - 1] & ~seen[:, :, -1:]).any()
        seen = row
    chunk = selector.mask(q[:, :, 61:], k, scale=1.0)
    assert chunk.dense(19, 80).equal(reference(ALPHA[0], BETA[0], 3, 19, 80))


def test_unchanged_spans_keep_their_mask():
    q, k, _ = inputs(1, 2, 1, 60, 60)
    selector = MoA(((10.0, 20.0),), ((0.0, 0.05),), 2).selector(0, 1)
    masks = [selector.mask(q[:, :, :40], k[:, :, :40], scale=1.0)]
    masks += [selector.mask(q[:, :, :1], k[:, :, :end], scale=1.0) for end in (41, 42)]
    assert masks[0] is masks[1] is masks[2]
    late = selector.mask(q[:, :, :18], k, scale=1.0)
    assert late is not masks[0]
    assert late.offsets[1].tolist() == list(range(21))


def test_keep_all_is_plain_attention():
    q, k, v = inputs(2, 4, 2, 65, 65)
    assert MoA(ALPHA, BETA).selector(1, 2).mask(q, k, scale=1.0) is None
    # One head that is not full, of four: the others are marked as full.
    mask = MoA(((*ALPHA[1][:3], 0.0),), ((*BETA[1][:3], 0.0),), 3).selector(0, 1)
    mask = mask.mask(q, k, scale=0.25)
    assert isinstance(mask, Stripes)
    assert mask.full_heads.tolist() == [True, True, True, False]
    ideal = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    out = attention(q, k, v, mask, scale=0.25)
    torch.testing.assert_close(out[:, :3], ideal[:, :3])
    assert not torch.allclose(out[:, 3], ideal[:, 3])


@pytest.mark.parametrize("length", [1, 10, 111])
@pytest.mark.parametrize(("alpha", "beta"), [(0, 0.0), (7, 0.0), (-5, 0.5), (0, 0.29), (0, 1.0)])
def test_span_and_density_are_those_of_the_mask(alpha, beta, length):
    span = span_at(alpha, beta, length, sinks=4)
    seen = reference([alpha], [beta], 4, length, length)
    assert int(seen[0, 0, -1].sum()) == span
    pairs = length * (length + 1) / 2
    assert span_density(span, length) == pytest.approx(int(seen.sum()) / pairs)


def all_choices(loss, cost):
    """(mean cost, total loss) of every choice."""
    return [
        (sum(cost[r] for r in rules) / len(loss), sum(loss[h][r] for h, r in enumerate(rules)))
        for rules in itertools.product(range(len(cost)), repeat=len(loss))
    ]


def lower_hull(points):
    """The points that no mean of two others beats, from the cheapest to the best."""
    best = min(loss for _, loss in points)
    at = min(points)
    out = [at]
    while at[1] > best:
        ahead = [p for p in points if p[0] > at[0] and p[1] < at[1]]
        at = min(ahead, key=lambda p: ((p[1] - at[1]) / (p[0] - at[0]), -p[0]))
        out.append(at)
    return out


def random_profile(seed, heads, rules, kind):
    generator = torch.Generator().manual_seed(seed)
    loss = torch.rand(heads, rules, generator=generator, dtype=torch.float64)
    cost = torch.rand(rules, generator=generator, dtype=torch.float64)
    if kind == "falling":  # More keys never hurt.
        cost = cost.sort().values
        loss = loss.sort(-1, descending=True).values
    return loss.tolist(), cost.tolist()


@pytest.mark.parametrize("kind", ["falling", "any"])
@pytest.mark.parametrize("seed", range(6))
def test_spans_are_the_best_where_the_budget_ends_with_a_step(seed, kind):
    loss, cost = random_profile(seed, heads=4, rules=5, kind=kind)
    points = all_choices(loss, cost)
    hull = lower_hull(points)
    assert len(hull) > 3
    for budget, least in hull:
        chosen = choose_rules(loss, cost, budget=budget + 1e-12)
        assert sum(loss[h][r] for h, r in enumerate(chosen)) == pytest.approx(least)


@pytest.mark.parametrize("kind", ["falling", "any"])
@pytest.mark.parametrize("seed", range(6))
def test_between_steps_spans_are_less_than_a_step_above_the_best(seed, kind):
    loss, cost = random_profile(seed, heads=4, rules=5, kind=kind)
    points = all_choices(loss, cost)
    hull = lower_hull(points)
    for part in range(1, 40):
        budget = min(cost) + (max(cost) - min(cost)) * part / 40
        chosen = choose_rules(loss, cost, budget=budget)
        total = sum(loss[h][r] for h, r in enumerate(chosen))
        assert sum(cost[r] for r in chosen) / 4 <= budget + 1e-9
        best = min(loss for mean, loss in points if mean <= budget + 1e-9)
        # The last point of the hull within the budget is a choice: ours is no worse.
        step = [loss for mean, loss in hull if mean <= budget + 1e-9][-1]
        assert best - 1e-9 <= total <= step + 1e-9


def test_a_dearer_rule_that_gains_nothing_is_not_taken():
    assert choose_rules([[3.0, 1.0, 1.0], [2.0, 2.5, 2.0]], [0.1, 0.2, 0.9], budget=1.0) == [1, 0]


def test_a_table_from_influence_keeps_to_the_budget():
    torch.manual_seed(0)
    lengths = [256, 512]
    rules = list(itertools.product((-64.0, 0.0, 128.0, 512.0), (0.0, 0.1, 0.4, 1.0)))
    spans = torch.tensor([[span_at(a, b, n, sinks=16) / n for n in lengths] for a, b in rules])
    # Each head's influence falls with its share of the length, at a pace of its own.
    pace = torch.logspace(-1, 1.5, 12).view(3, 4, 1, 1)
    influence = (-pace * spans).exp() * torch.rand(3, 4, 1, 1)
    last = math.inf
    for density in (0.1, 0.25, 0.5, 0.9):
        method = MoA.from_influence(
            influence, rules=rules, lengths=lengths, density=density, sinks=16
        )
        shares, total = [], 0.0
        for layer, head in itertools.product(range(3), range(4)):
            rule = method.alpha[layer][head], method.beta[layer][head]
            total += float(influence[layer, head, rules.index(rule)].mean())
            shares += [span_density(span_at(*rule, n, sinks=16), n) for n in lengths]
        assert density - 0.1 < sum(shares) / len(shares) <= density + 1e-9
        assert total < last
        last = total
        assert method.sinks == 16
    assert len(set(method.beta[0] + method.beta[1])) > 1


def test_settings_are_plain_and_come_back():
    method = MoA(ALPHA, BETA)
    settings = method.settings()
    assert settings["sinks"] == 64
    assert MoA(**{**settings, "alpha": [list(row) for row in ALPHA]}) == method


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"alpha": ()}, "alpha"),
        ({"beta": ((0.0,), (0.0,))}, "alpha and beta"),
        ({"beta": ((0.0, 2.0),)}, "beta"),
        ({"alpha": ((0.0, math.nan),)}, "alpha must be finite"),
        ({"sinks": -1}, "sinks"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(settings, name):
    with pytest.raises(ValueError, match=name):
        MoA(**{"alpha": ((1.0, 2.0),), "beta": ((0.1, 0.2),), **settings})


def test_another_models_tables_are_refused():
    with pytest.raises(ValueError, match="2 layers but the model has 3"):
        MoA(ALPHA, BETA).selector(0, 3)
    q, k, _ = inputs(1, 6, 2, 9, 9)
    with pytest.raises(ValueError, match="4 heads"):
        MoA(ALPHA, BETA).selector(0, 2).mask(q, k, scale=1.0)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"influence": torch.zeros(1, 2, 3, 1)}, "influence must be"),
        ({"influence": torch.full((1, 2, 2, 1), math.nan)}, "not finite"),
        ({"density": 0.0}, "density"),
        ({"density": 0.05}, "smallest of rules"),
    ],
    ids=["shape", "nan", "zero", "small"],
)
def test_profiles_that_do_not_fit_are_refused(change, name):
    profile = {
        "influence": torch.rand(1, 2, 2, 1),
        "rules": [(0.0, 0.1), (0.0, 0.5)],
        "lengths": [100],
        "density": 0.3,
        "sinks": 4,
    }
    MoA.from_influence(**profile)
    with pytest.raises(ValueError, match=name):
        MoA.from_influence(**{**profile, **change})
