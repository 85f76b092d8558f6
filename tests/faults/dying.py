"""Run something in a forked process that dies, or whose disk is full, at a chosen place."""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "fcntl.flock")


def child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked process; its exit code, or the negative number of its signal."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(900)  # A guard against hanging alone.
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(step: int, folder: Path, work: Callable[[], object]) -> bool:
    """Run ``work`` and kill it (SIGKILL) right before its ``step``-th step in a folder, from 0.

    A step is any opening, making, renaming or removing of something below ``folder``, as Python's
    audit events tell; so the code under test is not looked into.

    Returns:
        Whether it was killed; False if it ended before.
    """
    home, count = os.fspath(folder), 0

    def watch(event, given):
        nonlocal count
        if event in WRITES and any(isinstance(a, str) and a.startswith(home) for a in given):
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    def watched():
        sys.addaudithook(watch)
        work()

    code = child(watched)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def out_of_space(limit: int, *, kill: bool = False) -> None:
    """Let no file of this process grow beyond ``limit`` bytes: writing fails, or kills."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def out_of_memory_at(limit: int) -> None:
    """Let this process take at most ``limit`` bytes more of memory, where Linux tells how much."""
    if not Path("/proc/self/statm").exists():
        return
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + limit, taken + limit))
