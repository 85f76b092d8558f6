"""benchmarks/checks/soak.py: a short run of it, and what it must find."""

from __future__ import annotations

import importlib
import json
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "checks"

needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")


@pytest.fixture(scope="module")
def soak():
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("soak")
    finally:
        sys.path.remove(str(FOLDER))


@needs_proc
def test_two_hundred_steps_keep_every_promise(soak, tmp_path):
    words = ["--steps", "200", "--every", "50", "--device", "cpu", "--out", str(tmp_path / "s")]
    # So few steps are all warm-up: what the process grows by says nothing.
    assert soak.main([*words, "--tolerance-mib", "1000"]) == 0
    found = json.loads((tmp_path / "s").read_text(encoding="utf-8"))
    assert set(found["cases"]) == {"lifetimes", "capped", "dynamic"}
    for case in found["cases"].values():
        assert case["ok"]
        assert (case["steps"], case["checks"]) == (200, 4)
        assert len(case["readings_mib"]) == 4
    assert torch.__version__.startswith(found["versions"]["torch"])


def without(place):
    """Keep the slots of largest score, but none of these."""

    def choose(score, count):
        score = score.clone()
        score[..., place] = -2
        return score.argsort(-1, descending=True)[..., :count].sort(-1).values

    return choose


def out_of_order(score, count):
    return score.argsort(-1, descending=True)[..., :count]


@needs_proc
@pytest.mark.parametrize(
    ("choose", "promise"),
    [
        (without(slice(4)), "the first tokens stay"),
        (without(slice(-64, None)), "the last tokens stay"),
        (out_of_order, "kept keys stay in order"),
        (lambda score, count: torch.arange(10_000)[: count + 200][None], None),
    ],
    ids=["not the first", "not the last", "no order", "too many"],
)
def test_a_capped_cache_that_breaks_a_promise_is_found(soak, monkeypatch, choose, promise):
    from dynmask.hf import capped

    monkeypatch.setattr(capped, "kept", choose)
    if promise is None:
        promise = "never more slots than the cap"
        monkeypatch.setattr(capped, "_ROOM", 0)
    found = soak.soak("capped", 100, 5, "cpu", 0, tolerance=16)
    assert not found["ok"]
    assert found["broken"] == promise


@needs_proc
def test_a_bounded_cache_that_keeps_the_last_keys_is_found(soak, monkeypatch):
    from dynmask.ops import bounded

    insert = bounded.insert_by_torch
    monkeypatch.setattr(
        bounded, "_insert_function", lambda device: lambda *a: insert(*a[:7], a[7] + 9, *a[8:])
    )
    found = soak.soak("lifetimes", 40, 5, "cpu", 0, tolerance=16)
    assert found["broken"] == "the best scores of all tokens, by arrival"


@needs_proc
def test_memory_that_grows_is_found(soak, monkeypatch):
    kept = []

    def leaking(steps, device, draw):
        for _ in range(steps):
            # Straight from the system: an allocator would first use what earlier tests freed.
            kept.append(mmap.mmap(-1, 64 << 20))
            kept[-1].write(b"1" * len(kept[-1]))
            yield lambda: None

    monkeypatch.setitem(soak.CASES, "leaking", leaking)
    found = soak.soak("leaking", 8, 2, "cpu", 0, tolerance=16)
    for leaked in kept:
        leaked.close()
    assert found["broken"] == "memory stays flat"


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_kept_soak_is_whole(device):
    path = FOLDER.parent / "results" / f"soak_{device}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["steps"] == 10_000
    assert [case["steps"] for case in found["cases"].values()] == [10_000] * 3
    assert all(case["ok"] for case in found["cases"].values())
