"""The pages of docs/ run as they stand and print what they say; their links are right.

A page's Python blocks run in order, in one namespace and an empty folder. A comment behind a
``print``, or a line of its own at the left margin, is a line of the output. Commands of the other
blocks parse.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from dynmask.cli import build_parser

ROOT = Path(__file__).parents[2]
# What needs a training run is run beside the tests of training, in small.
ELSEWHERE = {"train.md": "tests/train/test_train_docs.py"}
PAGES = sorted((ROOT / "docs").rglob("*.md"))
# The other texts of the checkout; the README's Python blocks run in tests/test_readme.py.
BESIDE = [*sorted(ROOT.glob("*.md")), ROOT / "benchmarks/README.md", ROOT / "examples/README.md"]
each_text = pytest.mark.parametrize(
    "page", [*PAGES, *BESIDE], ids=lambda p: p.relative_to(ROOT).as_posix()
)
each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda p: p.relative_to(ROOT / "docs").as_posix()
)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """An empty folder, one thread, and random numbers that others do not notice."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(before)


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands_of(page):
    """Every ``dynmask ...`` of the page's shell and unnamed blocks, as words behind ``dynmask``."""
    text = page.read_text(encoding="utf-8")
    found = []
    for kind, block in re.findall(r"^```(\S*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if kind not in ("", "console", "sh", "bash"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if "dynmask" in words[:1] or ("torchrun" in words[:1] and "dynmask" in words):
                found.append(words[words.index("dynmask") + 1 :])
    return found


def stated_output(block):
    return [a or b for a, b in re.findall(r"^ *print\(.*\)  # (.+)$|^# (.+)$", block, re.MULTILINE)]


@each_page
def test_python_blocks_run(page, capsys):
    if page.name in ELSEWHERE:
        assert page.name in (ROOT / ELSEWHERE[page.name]).read_text(encoding="utf-8")
        return
    names = {"__name__": page.stem}
    for number, block in enumerate(blocks_of(page), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
        printed = capsys.readouterr().out.splitlines()
        stated = stated_output(block)
        assert not stated or printed == stated, f"block {number}"


def test_stated_output_is_found():
    block = (
        "x = 1  # not this\nfor i in (1, 2):\n    # nor this\n    print(i)  # 1\n# 2\nprint(x)\n"
    )
    assert stated_output(block) == ["1", "2"]


@each_text
def test_commands_parse(page):
    for words in commands_of(page):
        assert build_parser(words).parse_args(words).command == words[0]


def test_commands_are_found():
    assert ["doctor"] in commands_of(ROOT / "docs" / "guide" / "install.md")
    assert len(commands_of(ROOT / "docs" / "guide" / "evaluate.md")) > 5


@each_text
def test_links_lead_somewhere(page):
    """To a file of the checkout; the built site's test sees those to pages that it makes."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target or re.match(r"(\.\./)*(reference|project)/|\.\./results/repeat", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
            assert anchor in slugs, target


def test_every_task_is_named():
    (tasks,) = (a for a in _parser_of("eval")._actions if a.dest == "task")
    text = (ROOT / "docs" / "guide" / "evaluate.md").read_text(encoding="utf-8")
    for task in tasks.choices:
        assert f"| `{task}` |" in text


def _parser_of(command):
    (commands,) = (a for a in build_parser([command])._actions if a.dest == "command")
    return commands.choices[command]
