"""The arguments of the drivers in benchmarks/trained, and work for several processes."""

import argparse
import math
import os
import time
from itertools import count

_STARTS = count()


def arguments(folder, **changes):
    """As a command line would give them, a start of its own each time."""
    given = {
        "out": folder / "cells.jsonl",
        "runs": folder / "runs",
        "data": None,
        "budget_seconds": math.inf,
        "only": [],
        "set": [],
        "commit": None,
        "jobs": 1,
    }
    made = argparse.Namespace(**given | changes)
    made.deadline = time.monotonic() + made.budget_seconds
    made.start = f"start {next(_STARTS)}"
    return made


def breaks(args):
    """Two processes take a piece each; one of them is killed, the other does all the rest."""
    from claims import claim, locked

    while True:
        waiting = False
        for piece in "abc":
            with claim(args.runs / piece, args.start) as state:
                waiting |= state == "taken"
                if state != "mine":
                    continue
                if piece == "a":
                    while not (args.runs / "b.done").exists():
                        time.sleep(0.01)
                    os._exit(9)
                with locked(args.out), args.out.open("a") as file:
                    file.write(f"{piece} {os.getpid()}\n")
                (args.runs / f"{piece}.done").touch()
        if not waiting:
            return
        time.sleep(0.01)


def late(args):
    """Has no time."""
    from jobs import OutOfTime

    raise OutOfTime
