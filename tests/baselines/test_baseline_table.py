"""The README's table of methods says what the methods say of themselves."""

import inspect
from pathlib import Path

import pytest

from dynmask.baselines import METHODS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", METHODS)
def test_each_method_has_its_line(name):
    method = METHODS[name]
    file = Path(inspect.getfile(method)).name
    assert (
        f"| `{name}` | [{method.paper}](https://arxiv.org/abs/{method.paper}) "
        f"| [`{file}`](dynmask/baselines/{file}) | {method.selects} | {', '.join(method.stages)} |"
    ) in README
