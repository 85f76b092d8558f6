"""Fuzz one target with atheris, guided by coverage: ``python fuzz/run.py TARGET [OPTIONS]``.

``pip install atheris`` first (no part of the dev extra; its wheels are for Linux). Options are
libFuzzer's: ``-max_total_time=60``, ``-runs=100000``, a folder for the corpus. A finding ends the
run and leaves a ``crash-*`` file; ``python fuzz/run.py TARGET crash-...`` shows it again.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["dynmask", "yaml", "json"]):
    from targets import TARGETS, seeds


def main() -> None:
    """Hand the target and its seeds to libFuzzer."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python fuzz/run.py {{{','.join(TARGETS)}}} [libFuzzer options]")
    name = sys.argv.pop(1)
    corpus = Path(tempfile.mkdtemp(prefix=f"dynmask-{name}-"))
    for number, seed in enumerate(seeds()[name]):
        (corpus / f"seed-{number}").write_bytes(seed)
    given = [word for word in sys.argv[1:] if not word.startswith("-")]
    atheris.Setup([*sys.argv, *([] if given else [str(corpus)])], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
