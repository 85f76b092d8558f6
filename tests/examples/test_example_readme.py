"""Every example stands in the list, and is run by a test."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_script_is_listed_and_tested():
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")}
    listed = re.findall(
        r"^\| \[(\S+)\]\((\S+)\) ", (ROOT / "examples" / "README.md").read_text(), re.M
    )
    assert {name for name, _ in listed} == scripts
    assert all(name == target for name, target in listed)
    tests = [*Path(__file__).parent.glob("test_*.py"), ROOT / "tests/docs/test_plain_example.py"]
    run = "".join(path.read_text() for path in tests)
    assert [
        name
        for name in scripts
        if f'"{name.removesuffix(".py")}"' not in run and f'"{name}"' not in run
    ] == []
