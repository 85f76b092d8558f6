"""Plans whose fingerprint somebody made up: refused by name, whatever it holds."""

from __future__ import annotations

import dataclasses

import pytest
from fault_models import make_model, state

from dynmask.hf import accelerate

WEIGHTS = {
    "list": [1, 2],
    "text": "lm_head.weight",
    "number": 3,
    "null": None,
    "empty": {},
    "other names": {"w": [0.0] * 8},
}
VALUES = {
    "text": "x" * 8,
    "texts": ["x"] * 8,
    "null": None,
    "mapping": {"a": 1},
    "ragged": [[1.0], [1.0, 2.0]],
    "beyond float": [10**400] * 8,
    "true": [True] * 8,
    "short": [0.0],
    "number": 0.5,
}


def refused(plan, weights):
    model = make_model()
    before = state(model)
    hostile = dataclasses.replace(plan, fingerprint={**plan.fingerprint, "weights": weights})
    with pytest.raises(ValueError, match="made for another model"):
        accelerate(model, hostile)
    assert state(model) == before


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_of_another_form(plan, weights):
    refused(plan, weights)


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_values_of_another_form(plan, value):
    refused(plan, dict.fromkeys(plan.fingerprint["weights"], value))
