import pytest

from dynmask.baselines.amount import amount_of, check_amount


@pytest.mark.parametrize(
    ("value", "keys", "expected"),
    [(5, 111, 5), (500, 111, 111), (0.1, 111, 12), (0.07, 100, 7), (0.29, 100, 29), (1.0, 7, 7)],
)
def test_a_share_is_rounded_up_and_no_amount_is_more_than_all(value, keys, expected):
    check_amount("keep", value)
    assert amount_of(value, keys) == expected


def test_the_smallest_share_is_one_key():
    assert amount_of(1e-6, 1000) == 1
    assert amount_of(1e-12, 1) == 1


@pytest.mark.parametrize("value", [0, -3, 0.0, 1.5, -0.5, True, "0.5", None, float("nan")])
def test_what_is_no_amount_is_refused(value):
    with pytest.raises(ValueError, match="keep="):
        check_amount("keep", value)
