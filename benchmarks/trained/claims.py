"""Locks between processes that fill one file: each cell is done by one of them."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

Claim = Literal["mine", "taken", "tried"]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock ends with its process, also a killed one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with _released(file):
            yield


@contextmanager
def claim(path: Path, start: str) -> Iterator[Claim]:
    """Whether this process is to do something now.

    Args:
        path: a file of its own for what is to be done.
        start: the same for all processes that one command started.

    Yields:
        ``taken`` while another process does it; ``tried`` if one of the same start did, also if
        it failed or was killed; else ``mine``, and no other process gets it meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield "taken"
            return
        with _released(file):
            file.seek(0)
            if file.read() == start:
                yield "tried"
                return
            file.truncate(0)
            file.write(start)
            file.flush()
            yield "mine"


@contextmanager
def _released(file: IO[str]) -> Iterator[None]:
    try:
        yield
    finally:
        # Said, since processes that load data may still have the file open.
        fcntl.flock(file, fcntl.LOCK_UN)
