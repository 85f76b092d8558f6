"""What conftest.py promises of random numbers and of Hypothesis."""

import os
import random

import pytest
import torch
from hypothesis import HealthCheck, settings


def draw():
    return random.random(), torch.rand(3).tolist()


@pytest.fixture(scope="module")
def shared():
    return draw()


@pytest.fixture
def own(shared):
    return draw()


@pytest.mark.parametrize("more", [0, 1, 2], ids=["first", "second", "third"])
def test_draws_do_not_depend_on_what_ran_before(shared, own, more):
    assert own == shared
    assert draw() != own
    for _ in range(more):
        draw()


def test_hypothesis_is_patient_and_draws_as_told():
    now = settings()
    assert now.deadline is None
    assert HealthCheck.too_slow in now.suppress_health_check
    assert now.derandomize or "CI" not in os.environ
