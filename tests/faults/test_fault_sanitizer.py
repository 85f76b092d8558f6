"""benchmarks/checks/sanitizer.py: its calls in the interpreter, and how it reads a tool's log."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "checks"


@pytest.fixture(scope="module")
def sanitizer():
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("sanitizer")
    finally:
        sys.path.remove(str(FOLDER))


MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at _forward_kernel+0x70 in forward.py:123
=========     by thread (0,0,0) in block (3,0,0)
=========     Address 0x7f is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f of size 4 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: insert_kernel in insert.py:9
=========
========= Invalid __global__ read of size 16 bytes
=========     at 0x160 in /somewhere/dkdv.py:92:blocks_dkdv_kernel
=========     by thread (1,0,0) in block (0,0,0)
========= Invalid __global__ read of size 4 bytes
=========     at void at::native::add_kernel<float>(int, T1)+0x340
=========     by thread (1,0,0) in block (0,0,0)
========= Program hit CUDA_ERROR_INVALID_VALUE (error 1) due to "invalid argument" on CUDA API call
=========     Saved host backtrace up to driver entry point at error
=========         Host Frame: _decode_kernel in x.py
========= ERROR SUMMARY: 4 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at dq_kernel+0x5a in dq.py:90
=========     and Write access at dq_kernel+0x5a in dq.py:90 [6136 hazards]
=========
========= Warning: Race reported between Read access at other_dq_kernel_2+0x5a in a.cu:90
=========     and Write access at other_dq_kernel_2+0x5a in a.cu:90 [8 hazards]
========= Error: Potential WAW hazard detected at __shared__ 0x404 in block (0,0,0) :
=========     Write Thread (23,0,0) at encode_kernel_0d1d+0x1a0 in select_kernels.py:32
=========     Write Thread (24,0,0) at encode_kernel_0d1d+0x1a0 in select_kernels.py:32
========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)
"""
INITCHECK = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::reduce_kernel<512, 1>(T3)+0x10
=========     by thread (0,0,0) in block (0,0,0)
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0x30 in void at::native::reduce_kernel<512, 1>(T3)
=========     by thread (0,0,0) in block (0,0,0)
========= ERROR SUMMARY: 2 errors
"""
LOGS = {
    "memcheck": (
        MEMCHECK,
        {"_forward_kernel": 1, "blocks_dkdv_kernel": 1},
        {"void at::native::add_kernel<float>(int, T1)": 1, "(a call of the CUDA API)": 1},
    ),
    "racecheck": (RACECHECK, {"dq_kernel": 1, "encode_kernel": 1}, {"other_dq_kernel_2": 1}),
    "initcheck": (INITCHECK, {}, {"void at::native::reduce_kernel<512, 1>(T3)": 2}),
}


@pytest.mark.parametrize("tool", LOGS)
def test_reports_are_told_apart_by_kernel(sanitizer, tool):
    log, ours, others = LOGS[tool]
    found = sanitizer.judge(log, sanitizer.our_kernels())
    assert found["ours"] == ours
    assert found["others"] == others
    assert len(found["summary"]) == 1


def test_every_kernel_of_the_package_is_known(sanitizer):
    found = sanitizer.our_kernels()
    assert {"_forward_kernel", "insert_kernel", "keys_kernel", "narrow_kernel"} <= set(found)
    assert found["dq_kernel"] == ["dynmask.ops.triton.dq", "dynmask.ops.triton.hopper_dq"]


def stand_in(folder, log, *, ends=True):
    """A program with compute-sanitizer's options that writes a given log."""
    path = folder / "compute-sanitizer"
    (folder / "given.log").write_text(log, encoding="utf-8")
    path.write_text(
        f"""#!{sys.executable}
import os, pathlib, subprocess, sys, time
words = sys.argv[1:]
log = pathlib.Path({str(folder / "given.log")!r}).read_text()
pathlib.Path(words[words.index("--log-file") + 1]).write_text(log)
assert ("PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ) == (words[1] != "racecheck")
done = subprocess.run(words[words.index(sys.executable):]).returncode
{"" if ends else "time.sleep(600)"}
sys.exit(done)
""",
        encoding="utf-8",
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("log", "calls", "status"),
    [
        (INITCHECK, ["one", "two"], "clean"),
        (MEMCHECK, ["one", "two"], "reports"),
        (INITCHECK, ["one"], "failed"),
        ("", ["one", "two"], "failed"),
        (INITCHECK, None, "out of time"),
    ],
    ids=["others' alone", "ours", "a call is missing", "no log", "never ends"],
)
def test_status_of_a_tool(sanitizer, tmp_path, monkeypatch, log, calls, status):
    calling = tmp_path / "calls.py"
    calling.write_text("".join(f"print('CALL {name} ok')\n" for name in calls or ["one"]))
    monkeypatch.setattr(sanitizer, "SCRIPT", calling)
    program = stand_in(tmp_path, log, ends=calls is not None)
    limit = 600 if calls is not None else 1
    expected = {"one", "two"}
    found = sanitizer.under("initcheck", program, [], limit, expected=expected)
    assert found["status"] == status
    if calls is not None:
        assert found["calls"] == dict.fromkeys(calls, "ok")


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")
def test_the_calls_run_dry_and_reach_every_kernel(sanitizer, tmp_path, capsys):
    pytest.importorskip("triton")
    words = ["--dry", "--limit", "600", "--out", str(tmp_path / "dry.json")]
    assert sanitizer.main(words) == 0
    found = json.loads((tmp_path / "dry.json").read_text(encoding="utf-8"))
    assert set(found["plain"]["calls"].values()) == {"ok"}
    # A kernel that is new has to be called there too. Those for Hopper run on a GPU alone.
    assert all(".hopper" in name for name in found["not_launched"])
    assert "insert_kernel               yes" in capsys.readouterr().out


def test_without_the_tool_it_says_what_is_missing(sanitizer, capsys, monkeypatch):
    monkeypatch.setattr(sanitizer, "find_sanitizer", lambda given: None)
    assert sanitizer.main([]) == 2
    assert "--dry" in capsys.readouterr().out
