import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmask.dam import AMPLIFIERS, Settings

BAD = {
    "capture_length-small": ({"capture_length": 1}, "capture_length=1"),
    "capture_length-large": ({"capture_length": 10**9}, "capture_length=1000000000"),
    "capture_length-float": ({"capture_length": 512.0}, "capture_length=512.0 must be an int"),
    "capture_length-bool": ({"capture_length": True}, "capture_length=True"),
    "amplify": ({"amplify": "boxcox"}, "amplify='boxcox' is unknown.*box-cox"),
    "lam-negative": ({"lam": -0.5}, "lam=-0.5"),
    "lam-tiny": ({"lam": 1e-5}, "lam=1e-05"),
    "lam-nan": ({"lam": float("nan")}, "lam=nan"),
    "eps-zero": ({"eps": 0.0}, "eps=0.0"),
    "eps-large": ({"eps": 0.5}, "eps=0.5"),
    "tau-zero": ({"tau": 0.0}, "tau=0.0"),
    "tau-negative": ({"tau": -1.0}, "tau=-1.0"),
    "tau-nan": ({"tau": float("nan")}, "tau=nan"),
    "tau-above-range": ({"tau": 2.1}, "tau=2.1 .* at most 1.99998"),
    "tau-mean": ({"tau": 1.5, "amplify": "mean"}, "tau=1.5 .* at most 1"),
    "tau-sum-infinite": ({"tau": float("inf"), "amplify": "sum"}, "tau=inf"),
    "tau-z-score": ({"tau": float("-inf"), "amplify": "z-score"}, "tau=-inf must be finite"),
    "tau-huge": ({"tau": 10**400, "amplify": "z-score"}, "tau is too large"),
    "tau-text": ({"tau": "0.1"}, "tau='0.1' must be a float, not str"),
    "mu-zero": ({"mu": 0.0}, "mu=0.0"),
    "mu-large": ({"mu": 1.01}, "mu=1.01"),
    "support-one": ({"support": 1.0}, "support=1.0"),
    "support-negative": ({"support": -0.1}, "support=-0.1"),
    "coverage-zero": ({"coverage": 0}, "coverage=0.0"),
    "coverage-large": ({"coverage": 95}, "coverage=95.0"),
    "coverage_length-small": ({"coverage_length": 1}, "coverage_length=1"),
    "coverage_length-float": ({"coverage_length": 4e3}, "coverage_length=4000.0 must be an int"),
    "holdout-zero": ({"holdout": 0.0}, "holdout=0.0"),
    "holdout-one": ({"holdout": 1.0}, "holdout=1.0"),
    "seed": ({"seed": -1}, "seed=-1"),
}


@pytest.mark.parametrize(("values", "message"), BAD.values(), ids=BAD)
def test_a_bad_value_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        Settings(**values)


@pytest.mark.parametrize("tau", [-3.0, 0.0, 100.0])
def test_z_score_takes_any_finite_tau(tau):
    assert Settings(amplify="z-score", tau=tau).tau == tau


@settings(deadline=None, max_examples=50)
@given(
    amplify=st.sampled_from(sorted(AMPLIFIERS)),
    lam=st.just(0.0) | st.floats(0.01, 2),
    eps=st.floats(1e-30, 1e-2),
    share=st.floats(0, 1, exclude_min=True),
)
def test_round_trip_through_json(amplify, lam, eps, share):
    _, high = AMPLIFIERS[amplify].bounds(lam, eps)
    tau = share * min(high, 1e6) or high
    chosen = Settings(amplify=amplify, lam=lam, eps=eps, tau=tau, mu=share, coverage=share)
    assert Settings.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen


def test_from_dict_refuses_other_keys():
    values = Settings().to_dict()
    del values["tau"]
    with pytest.raises(ValueError, match=r"missing \['tau'\], unknown \['tua'\]"):
        Settings.from_dict(values | {"tua": 0.1})
