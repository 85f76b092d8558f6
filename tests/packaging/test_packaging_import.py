"""What an import loads, beyond what must be there anyway."""

import json
import subprocess
import sys

import pytest

STEPS = (
    ("", "dynmask"),
    ("import torch", "dynmask.ops"),
    ("from transformers import LlamaForCausalLM as _", "dynmask.hf"),
    ("", "dynmask.dma"),
)
CODE = """
import importlib, json, sys
added = {}
for before, module in json.loads(sys.argv[1]):
    exec(before)
    had = set(sys.modules)
    importlib.import_module(module)
    added[module] = sorted(set(sys.modules) - had)
print(json.dumps(added))
"""


@pytest.fixture(scope="module")
def added():
    """The modules that each import adds to what was loaded before it."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(STEPS)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("dynmask", set()),
        ("dynmask.ops", set()),
        ("dynmask.hf", {"safetensors"}),
        ("dynmask.dma", {"transformers"}),  # what Doge models are converted from
    ],
)
def test_import_adds_little(added, module, allowed):
    assert module in added[module]
    packages = {name.partition(".")[0] for name in added[module]} - sys.stdlib_module_names
    assert packages - {"dynmask"} <= allowed
