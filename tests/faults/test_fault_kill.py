"""SIGKILL in the middle of a save and of a calibration: the plan is the old one, the new, or none.

`tests/dam/test_store.py` interrupts single steps by exceptions; here nothing is cleaned up.
"""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from dying import child, killed_at, out_of_space
from fault_models import make_model, plan_for

from dynmask.cli import OK, main
from dynmask.dam import MaskPlan

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def same(a, b):
    return (a.settings, a.layers.keys()) == (b.settings, b.layers.keys()) and all(
        torch.equal(a.layers[i].corner, b.layers[i].corner)
        and torch.equal(a.layers[i].coverage, b.layers[i].coverage)
        for i in a.layers
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def others(plan):
    """A second plan whose tensors have other bytes."""
    first = min(plan.layers)
    return MaskPlan(
        fingerprint=plan.fingerprint,
        settings=plan.settings,
        data=plan.data,
        layers={first: plan.layers[first]},
    )


def test_killed_at_every_step_of_a_first_save(plan, tmp_path):
    step = 0
    while killed_at(step, tmp_path, lambda: plan.save(tmp_path / "plan")):
        if (tmp_path / "plan").exists():
            assert same(MaskPlan.load(tmp_path / "plan"), plan), step
        plan.save(tmp_path / "plan")
        assert same(MaskPlan.load(tmp_path / "plan"), plan), step
        for path in (tmp_path / "plan").iterdir():
            path.unlink()
        (tmp_path / "plan").rmdir()
        step += 1
    assert step > 5  # the steps were seen


def test_killed_at_every_step_of_replacing_a_plan(plan, others, tmp_path):
    folder, step, seen = tmp_path / "plan", 0, set()
    plan.save(folder)
    (folder / "notes.txt").write_text("mine")
    while killed_at(step, tmp_path, lambda: others.save(folder)):
        found = MaskPlan.load(folder)
        assert same(found, plan) or same(found, others), step
        seen.add(len(found.layers))
        plan.save(folder)
        assert same(MaskPlan.load(folder), plan), step
        # What the killed save left is tidied up; what is the user's own stays.
        assert len(names(folder)) == 3, (step, names(folder))
        assert names(tmp_path) == ["plan"]
        step += 1
    assert step > 5
    assert seen == {1, len(plan.layers)}  # before the switch, and after it
    assert same(MaskPlan.load(folder), others)


@pytest.mark.parametrize("size", [0, 1, 700, 5000])
def test_killed_in_the_middle_of_a_file(plan, others, tmp_path, size):
    plan.save(tmp_path / "plan")

    def work():
        out_of_space(size, kill=True)
        others.save(tmp_path / "plan")

    assert child(work) == -signal.SIGXFSZ
    assert same(MaskPlan.load(tmp_path / "plan"), plan)
    others.save(tmp_path / "plan")
    assert same(MaskPlan.load(tmp_path / "plan"), others)
    assert len(names(tmp_path / "plan")) == 2


def test_two_processes_save_to_one_folder(plan, others, tmp_path):
    folder = tmp_path / "plan"
    plan.save(folder)

    def work():
        for _ in range(25):
            others.save(folder)

    pid = os.fork()
    if pid == 0:
        os._exit(child(work) != 0)
    for _ in range(25):
        plan.save(folder)
        found = load_settled(folder)
        assert same(found, plan) or same(found, others)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    MaskPlan.load(folder)
    assert len(names(folder)) == 2


def load_settled(folder):
    """Load; a save in between takes the tensors away, which is said and passes."""
    for _ in range(200):
        try:
            return MaskPlan.load(folder)
        except ValueError as error:
            if "No such file" not in str(error):
                raise
            time.sleep(0.001)
    raise AssertionError("never readable")


@pytest.mark.parametrize("first", range(4))
def test_killed_calibration_resumes(plan, tmp_path, first):
    """Killed again and again, each time some steps on, until it ends; the last plan is the same."""
    work, deaths = tmp_path / "work", 0
    step = first
    while killed_at(step, tmp_path, lambda: plan_for(make_model(), work_folder=work)):
        for layer in work.glob("layer-*"):
            if (layer / "plan.json").exists():
                MaskPlan.load(layer)
        deaths += 1
        step += 9
    assert deaths >= 2
    assert same(plan_for(make_model(), work_folder=work), plan)


def test_killed_command_leaves_a_plan_or_none(model_folder, tmp_path):
    """`dynmask calibrate`: the same command again and again, until it is through."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "texts.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    words = ["calibrate", "--model", str(model_folder), "--texts", str(tmp_path / "texts.txt")]
    words += ["--out", str(home / "plan"), "--capture-length", "32", "--device", "cpu"]
    step, deaths = 0, 0
    while killed_at(step, home, lambda: main(words)):
        if (home / "plan").exists():
            MaskPlan.load(home / "plan")
        deaths += 1
        step += 5
    assert deaths >= 4
    MaskPlan.load(home / "plan")
    assert main(words) == OK
    # A save that was killed beside a new folder leaves its hidden one there, and nothing else.
    left = [name for name in names(home) if not name.startswith(".dynmask-")]
    assert left == ["plan"]
    assert len(names(home / "plan")) == 2
