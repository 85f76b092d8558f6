"""A full disk: what was there stays, nothing half made is left, and the next attempt works.

Two kinds: a limit on the size of files (``RLIMIT_FSIZE``), and, where mounting is allowed, a real
file system without room.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess

import pytest
from dying import child, out_of_space
from fault_models import make_model, plan_for

from dynmask.cli.inputs import write_text
from dynmask.dam import MaskPlan

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def fails(work, *, limit):
    """Run ``work`` in a process whose files cannot grow beyond ``limit``: it must raise OSError."""

    def limited():
        out_of_space(limit)
        try:
            work()
        except OSError as error:
            os._exit(0 if error.errno in (errno.EFBIG, errno.ENOSPC) else 3)

    assert child(limited) == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place):
    with (place / "filler").open("wb", 0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("limit", [0, 1, 100, 5000])
def test_save_leaves_the_old_plan(plan, tmp_path, limit):
    folder = tmp_path / "plan"
    plan.save(folder)
    before = tree(tmp_path)
    fails(lambda: plan.with_coverage(1.0).save(folder), limit=limit)
    assert tree(tmp_path) == before
    plan.with_coverage(1.0).save(folder)
    assert MaskPlan.load(folder).settings.coverage == 1.0


@pytest.mark.parametrize("limit", [0, 5000])
def test_first_save_leaves_nothing(plan, tmp_path, limit):
    fails(lambda: plan.save(tmp_path / "plan"), limit=limit)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("old", [False, True], ids=["new", "replaced"])
def test_save_on_a_full_file_system(plan, small_disk, old):
    folder = small_disk / "plan"
    if old:
        plan.save(folder)
    fill(small_disk)
    before = tree(small_disk)
    with pytest.raises((OSError, ValueError), match="No space"):
        plan.with_coverage(1.0).save(folder)
    assert tree(small_disk) == before
    (small_disk / "filler").unlink()
    plan.with_coverage(1.0).save(folder)
    assert MaskPlan.load(folder).settings.coverage == 1.0
    assert sorted(path.name for path in small_disk.iterdir()) == ["plan"]


def test_calibration_goes_on_when_there_is_room_again(plan, tmp_path):
    work = tmp_path / "work"
    fails(lambda: plan_for(make_model(), work_folder=work), limit=2000)
    assert tree(tmp_path) == {}
    again = plan_for(make_model(), work_folder=work)
    assert again.layers.keys() == plan.layers.keys()


def test_a_page_is_whole_or_not_there(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("old")
    fails(lambda: write_text(page, "new" * 1000), limit=100)
    assert tree(tmp_path) == {"page.html": b"old"}
