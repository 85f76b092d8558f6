import pytest
import torch
from attention_cases import naive_mask, padding, stripes
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmask.masks import Padding, Stripes

NONE = torch.zeros(1, dtype=torch.bool)


def one_head(columns, offsets, **more) -> Stripes:
    return Stripes(
        (torch.tensor(sorted(columns), dtype=torch.int64),),
        (torch.tensor(sorted({0, *offsets}), dtype=torch.int64),),
        NONE,
        **more,
    )


@settings(max_examples=60, deadline=None)
@given(
    columns=st.sets(st.integers(0, 20)),
    offsets=st.sets(st.integers(0, 20)),
    corner=st.integers(0, 9),
    k_len=st.integers(1, 14),
    data=st.data(),
)
def test_dense_and_counts_agree_with_the_definition(columns, offsets, corner, k_len, data):
    q_len = data.draw(st.integers(0, k_len))
    truth = torch.rand(1, corner, corner).gt(0.5).tril() if corner else None
    mask = one_head(columns, offsets, corner=truth)
    expected = naive_mask(mask, q_len, k_len)
    assert mask.dense(q_len, k_len).equal(expected)
    assert mask.visible_pairs(q_len, k_len).equal(expected.sum((2, 3)))
    start = data.draw(st.integers(0, k_len))
    stop = data.draw(st.integers(start, k_len))
    padded = mask & padding((start, stop), (0, k_len))
    expected = naive_mask(padded, q_len, k_len)
    assert padded.dense(q_len, k_len).equal(expected)
    assert padded.visible_pairs(q_len, k_len).equal(expected.sum((2, 3)))


@pytest.mark.parametrize("length", [1, 17, 63, 111])
def test_rows_are_rows_of_the_dense_mask(length):
    mask = stripes(4, 80, corner=17, full=(1,))
    positions = torch.randperm(length, generator=torch.Generator().manual_seed(0))[
        : length // 2 + 1
    ]
    expected = naive_mask(mask, length, length)[0]
    assert mask.rows(positions, length).equal(expected[:, positions])
    assert mask.rows(positions[:0], length).shape == (4, 0, length)
    padded = mask & padding((1, length))
    assert padded.rows(positions, length).equal(expected[:, positions])


@pytest.mark.parametrize("length", [1, 63, 65, 111])
def test_density_is_the_dense_count(length):
    mask = stripes(4, 80, corner=17, full=(1,))
    seen = mask.dense(length)[0]
    expected = seen.sum((1, 2)).double() / torch.ones(length, length).tril().sum()
    torch.testing.assert_close(mask.density(length), expected, rtol=1e-12, atol=0)


def test_density_needs_no_square():
    # A square of this length would take a terabyte.
    density = Stripes.streaming(2, sinks=4, window=128).density(1_000_000)
    n, w, s = 1_000_000, 128, 4
    # Window pairs, plus the sinks of the rows that have left them behind.
    pairs = w * (w + 1) // 2 + (n - w) * w + sum(n - w - c for c in range(s))
    assert density.tolist() == [pairs / (n * (n + 1) / 2)] * 2


def test_causal_and_streaming():
    assert Stripes.causal(2).dense(5).equal(torch.ones(1, 2, 5, 5, dtype=torch.bool).tril())
    assert Stripes.causal(2).all_full
    i, j = torch.arange(9)[:, None], torch.arange(9)
    expected = (j <= i) & ((j < 2) | (i - j < 3))
    assert Stripes.streaming(1, sinks=2, window=3).dense(9)[0, 0].equal(expected)


def test_and_shares_what_was_derived_and_leaves_the_mask_alone():
    mask = stripes(2, 20)
    padded = mask & padding((1, 4))
    assert padded.derived is mask.derived
    assert mask.padding is None
    assert padded.unpadded.padding is None
    with pytest.raises(ValueError, match="padded already"):
        padded & padding((0, 4))


def test_to_keeps_everything():
    mask = stripes(2, 20, corner=5) & padding((1, 4))
    moved = mask.to("meta")
    assert moved.device.type == "meta"
    assert moved.padding.start.device.type == "meta"
    assert mask.to("cpu") is mask


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Stripes((), (), NONE[:0]), "one tensor per head"),
        (lambda: Stripes((torch.arange(2),), (), NONE), "one tensor per head"),
        (lambda: Stripes((torch.arange(2),), (torch.arange(1),), torch.zeros(1)), "full_heads"),
        (lambda: Stripes((torch.arange(2),), (torch.arange(1, 3),), NONE), "contain 0"),
        (lambda: Stripes((torch.tensor([2, 1]),), (torch.arange(1),), NONE), "sorted"),
        (lambda: Stripes((torch.tensor([1, 1]),), (torch.arange(1),), NONE), "unique"),
        (lambda: Stripes((torch.tensor([-1]),), (torch.arange(1),), NONE), "non-negative"),
        (lambda: Stripes((torch.arange(2).int(),), (torch.arange(1),), NONE), "int64"),
        (lambda: one_head([], [], corner=torch.ones(1, 3, 3).bool()), "tril"),
        (lambda: one_head([], [], corner=torch.zeros(2, 3, 3).bool()), r"\[1, L, L\]"),
        (lambda: one_head([], [], corner=torch.zeros(1, 3, 4).bool()), r"\[1, L, L\]"),
        (lambda: Stripes.streaming(1, sinks=0, window=0), "window >= 1"),
        (lambda: one_head([], []).dense(3, 2), "q_len <= k_len"),
        (lambda: one_head([], []).density(0), "at least 1"),
        (lambda: one_head([], []).rows(torch.tensor([0, 5]), 5), r"\[0, 5\), got 0 to 5"),
        (lambda: one_head([], []).rows(torch.tensor([-1]), 5), r"\[0, 5\), got -1"),
        (lambda: one_head([], []).rows(torch.tensor([1.0]), 5), "1-d int64"),
    ],
    ids=range(17),
)
def test_refuses(build, match):
    with pytest.raises(ValueError, match=match):
        build()


def test_and_refuses_other_things():
    with pytest.raises(TypeError):
        stripes(1, 8) & torch.ones(1, 8)


def test_padding_from_mask_composes():
    mask = stripes(2, 12) & Padding.from_mask(torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]))
    assert mask.dense(4).equal(naive_mask(mask, 4, 4))


def test_stripes_of_some_heads_show_what_those_heads_saw():
    corner = (torch.rand(4, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.4).tril()
    corner |= torch.eye(9, dtype=torch.bool)
    mask = Stripes(
        columns=tuple(torch.tensor([h, h + 3]) for h in range(4)),
        offsets=tuple(torch.tensor([0, h + 1]) for h in range(4)),
        full_heads=torch.tensor([False, False, True, False]),
        corner=corner,
    )
    some = mask.of_heads([3, 0, 2])
    assert some.dense(30, 30).equal(mask.dense(30, 30)[:, [3, 0, 2]])
