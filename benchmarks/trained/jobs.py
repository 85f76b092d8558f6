"""Runs a driver's work in this process, or in several at once."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from dynmask.report.machine import usable_cores

Work = Callable[[argparse.Namespace], None]

LATE = 3
"""Exit status of a process whose budget is spent."""


class OutOfTime(Exception):
    """The budget is spent."""


def begin(args: argparse.Namespace) -> None:
    """Note in a driver's arguments when this start ends, and a name for it."""
    args.deadline = time.monotonic() + args.budget_seconds
    args.start = f"{os.getpid()} {time.time()}"


def go(args: argparse.Namespace, work: Work) -> None:
    """Work to the end or until the budget is spent, and say which.

    A process that breaks leaves its cell to the next start and all others to the other processes.

    Args:
        args: what a driver was given; ``jobs`` says how many processes.
        work: a function of the driver's module, which takes ``args``.

    Raises:
        SystemExit: a process broke.
    """
    begin(args)
    if args.jobs == 1:
        late, broken = not _in_time(args, work), 0
    else:
        codes = _spread(args, work)
        late, broken = LATE in codes, sum(code not in (0, LATE) for code in codes)
    if broken:
        raise SystemExit(f"{broken} of {args.jobs} processes broke; the same command goes on")
    print("the budget is spent; the same command goes on" if late else "all cells are there")


def _spread(args: argparse.Namespace, work: Work) -> list[Any]:
    """Work in so many processes and return their exit status."""
    # A forked process could not use CUDA, which was asked for devices already.
    context = multiprocessing.get_context("spawn")
    # They would go on without this one: by a signal, too.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    processes = []
    try:
        for number in range(args.jobs):
            processes.append(context.Process(target=_alone, args=(args, work), name=f"{number}"))
            processes[-1].start()
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()
        signal.signal(signal.SIGTERM, before)
    return [process.exitcode for process in processes]


def _alone(args: argparse.Namespace, work: Work) -> None:
    torch.set_num_threads(max(1, usable_cores() // args.jobs))
    if not _in_time(args, work):
        sys.exit(LATE)


def _in_time(args: argparse.Namespace, work: Work) -> bool:
    transformers.utils.logging.disable_progress_bar()
    try:
        work(args)
    except OutOfTime:
        return False
    return True
