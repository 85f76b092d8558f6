"""What all tests share. Here also so that pytest puts this folder on the path."""

import os
import random
import warnings

import pytest
import torch
from hypothesis import HealthCheck, settings

# Where the tensors of kernel tests live. Without a GPU, Triton's interpreter runs the kernels; it
# is chosen when triton is imported, so before any test module is.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Else as it was; under CI that is the same cases each time. A busy machine is slow, not wrong.
patient = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("patient", settings(), **patient)
settings.load_profile("patient")


def seed():
    # Of no test's own generators: what two draws share would make tests weaker.
    random.seed(20_260_601)
    torch.manual_seed(20_260_601)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Begin each test with the same random numbers, whatever its worker has run before."""
    seed()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    """Make what several tests share the same whichever of them comes first, and them too."""
    if fixturedef.scope == "function":
        return (yield)
    seed()
    made = yield
    seed()
    return made


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    """Commands write plain text of 80 columns, here and in processes of their own."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="session")
def device() -> str:
    """``"cuda"`` if there is a GPU, else ``"cpu"``."""
    return DEVICE


@pytest.fixture
def poisoned():
    """Fill new memory with NaN (integers: their largest), so that what is not written shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*", category=UserWarning)
        yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium; where it must be (CI) and is not, the test fails."""
    from chromium import Browser, find

    path = find()
    if path is None:
        message = "headless Chromium is missing: apt-get install -y chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    started = Browser(path, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()
