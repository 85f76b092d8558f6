"""``dynmask doctor``: versions beside those tested, GPUs, and each backend with its reason."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import dynmask.ops
from dynmask.cli import doctor
from dynmask.cli.tested import TESTED, remark
from dynmask.ops.attention import BACKENDS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "version", "outside"),
    [
        ("torch", "2.6.0", None),
        ("torch", "2.13.0+cpu", None),
        ("torch", "2.15.3", None),
        ("torch", "2.5.1", "older than 2.6, the oldest tested"),
        ("torch", "2.16.0a0+git1", "newer than 2.15, the newest tested"),
        ("transformers", "10.0.0", "newer than 5.23, the newest tested"),
        ("python", "3.9.1", "older than 3.11, the oldest tested"),
        ("rich", "99", None),
    ],
)
def test_versions_outside_what_was_tested_are_told(name, version, outside):
    assert remark(name, version) == outside


def test_the_guide_names_the_same_versions():
    text = (ROOT / "docs" / "guide" / "install.md").read_text(encoding="utf-8")
    for name, (oldest, newest) in TESTED.items():
        (row,) = re.findall(rf"^\| {name} \|.*$", text, re.MULTILINE | re.IGNORECASE)
        assert {oldest, newest} <= set(re.findall(r"\d+\.\d+", row)), name


def test_the_pinned_versions_were_tested():
    pinned = dict(
        re.findall(r"^(\w+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )
    names = TESTED.keys() - {"python"}
    assert names <= pinned.keys()
    assert {name: remark(name, pinned[name]) for name in names} == dict.fromkeys(names)


def found(check):
    return {finding.name: finding for finding in check()}


def test_a_missing_package_says_what_needs_it(monkeypatch):
    # Imported before: some packages keep the function that is in `importlib` when they load.
    found(doctor.packages)
    really = importlib.import_module

    def fake(name):
        if name in ("datasets", "safetensors"):
            raise ImportError("gone")
        return really(name)

    monkeypatch.setattr(importlib, "import_module", fake)
    packages = found(doctor.packages)
    assert packages["datasets"].ok is None
    assert packages["datasets"].text == "cannot import: gone; dynmask train will not run"
    assert packages["safetensors"].ok is False


def test_variables_that_matter_are_shown(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_HOME", raising=False)
    computer = found(doctor.computer)
    assert computer["HF_HUB_OFFLINE"].text == "1"
    assert "HF_HOME" not in computer


@pytest.mark.parametrize(
    ("cuda", "text"),
    [
        (None, "none: this torch is built for the CPU alone"),
        ("13.0", "none: torch is built for CUDA 13.0 and finds no GPU, or no driver for it"),
    ],
)
def test_no_gpu_says_why(monkeypatch, cuda, text):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found(doctor.gpus)["GPU"].text == text


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_backends_say_what_they_run(on_the_cpu):
    backends = found(doctor.backends)
    assert set(backends) == {f"backend {name}" for name in BACKENDS}
    assert backends["backend sdpa"].ok
    assert backends["backend sdpa"].text.startswith("Lifetimes, Stripes, Blocks on cpu, largest")
    assert "; not for Blocks: the cpu backend has no schedule" in backends["backend cpu"].text


def test_a_wrong_or_broken_backend_is_a_failed_check(on_the_cpu, monkeypatch):
    right = dynmask.ops.attention

    def fake(*args, impl):
        if impl == "sdpa":
            raise RuntimeError("no driver")
        return right(*args, impl=impl) + (impl == "cpu")

    monkeypatch.setattr(dynmask.ops, "attention", fake)
    backends = found(doctor.backends)
    assert backends["backend cpu"].ok is False
    assert backends["backend sdpa"].ok is False
    assert "no driver" in backends["backend sdpa"].text
    assert backends["backend reference"].ok
