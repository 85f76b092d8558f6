"""Run cases in two processes of torchrun and tell each outcome; used by tests and by workers."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import torch
from torch import distributed as dist

HERE = Path(__file__).parent
# A worker is a script: pytest has not put the folders of tests on its path.
PLACES = [str(HERE.parents[1]), *(str(HERE.parent / folder) for folder in ("dma", "hf"))]


def launch(logs, worker, *args):
    """Run a script of this folder in two processes on the CPU; return what each printed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    torchrun += ["--nproc-per-node", "2", "--redirects", "1", "--log-dir", str(logs)]
    command = [*torchrun, sys.executable, str(HERE / worker)]
    paths = [*PLACES, os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [*command, *map(str, args)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [log.read_text() for log in sorted(logs.rglob("stdout.log"))]


def outcomes(worker, folder, *args):
    """Return what `run` of a worker wrote: of each case None, or the traceback of a process."""
    launch(folder / "logs", worker, folder / "outcomes.json", *args)
    return json.loads((folder / "outcomes.json").read_text())


def run(cases, out):
    """In a worker: call each case in all processes, and write the outcomes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
    found = {}
    for name, case in cases.items():
        failure = None
        try:
            case()
        except Exception:
            failure = traceback.format_exc(limit=-4)
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, failure)
        found[name] = next((text for text in told if text), None)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def mean_of_all(value):
    """Return the mean of a number over the processes."""
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, value)
    return sum(told) / len(told)
