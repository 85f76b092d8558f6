"""Fuzz one target with atheris, guided by coverage: ``python fuzz/run.py TARGET [OPTIONS]``.

``pip install atheris`` first (no part of the dev extra; its wheels are for Linux). Options are
libFuzzer's: ``-max_total_time=60``, ``-runs=100000``, a folder for the corpus. A finding ends the
run and leaves a ``crash-*`` file; ``python fuzz/run.py TARGET crash-...`` shows it again. Valid
inputs are always there to start from.
"""

from __future__ import annotations

import copy
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["dynmask", "yaml", "json", "argparse"]):
    import json

    from targets import TARGETS, seeds

VALUES = [None, True, 0, -1, 2**31, 2**63, 10**400, 0.5, 1e308, float("inf"), float("nan")]
VALUES += ["", "0", "..", "\0", "\ud800", "a" * 300, [], {}, [[]], [0] * 70, {"": 0}]


def mutate_json(data: bytes, most: int, seed: int) -> bytes:
    """Change a value or a name somewhere inside a JSON text, or else its bytes."""
    draw = random.Random(seed)
    try:
        places = list(_places(whole := json.loads(data)))
        if places and draw.random() < 0.8:
            _change(places, draw)
            return json.dumps(whole).encode()[:most]
    except (ValueError, RecursionError):
        pass
    return atheris.Mutate(data, most)


def _change(places: list[tuple[Any, Any]], draw: random.Random) -> None:
    """Put another value, one of another place, none or the same twice in one of the places."""
    holder, key = draw.choice(places)
    from_holder, from_key = draw.choice(places)
    way = draw.randrange(4)
    if way == 0:
        holder[key] = draw.choice(VALUES)
    elif way == 1:
        holder[key] = copy.deepcopy(from_holder[from_key])
    elif way == 2:
        del holder[key]
    elif isinstance(holder, dict):
        holder[draw.choice(["", "0", "-1", "layers", "x"])] = holder[key]
    else:
        holder.append(holder[key])


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place of a value in a list or dict inside ``value``."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield value, key
            yield from _places(inner)


def main() -> None:
    """Hand the target and its seeds to libFuzzer."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python fuzz/run.py {{{','.join(TARGETS)}}} [libFuzzer options]")
    name = sys.argv.pop(1)
    corpus = Path(tempfile.mkdtemp(prefix=f"dynmask-{name}-"))
    for number, seed in enumerate(seeds()[name]):
        (corpus / f"seed-{number}").write_bytes(seed)
    # A folder that is given comes first: libFuzzer writes what it finds to the first.
    file = any(Path(word).is_file() for word in sys.argv[1:])
    mutator = {"custom_mutator": mutate_json} if name == "plan_body" else {}
    atheris.Setup([*sys.argv, *([] if file else [str(corpus)])], TARGETS[name], **mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
