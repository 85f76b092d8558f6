"""The wheel: what is in it, what it says of itself, and that it runs where there is no checkout."""

import email
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dynmask

pytest.importorskip("hatchling", reason="what builds the wheel: pip install hatchling")
ROOT = Path(__file__).parents[2]
# Whatever the user has set for pip, and without a home.
PIP = [sys.executable, "-m", "pip", "--isolated", "--no-cache-dir"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "-w", folder, ROOT], check=True, cwd=folder)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def content(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def metadata(content):
    (name,) = (name for name in content if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(content[name])


def test_wheel_is_pure_python(wheel, content):
    assert wheel.name == f"dynmask-{dynmask.__version__}-py3-none-any.whl"
    said = content[f"dynmask-{dynmask.__version__}.dist-info/WHEEL"].decode()
    assert "Root-Is-Purelib: true" in said
    assert not [n for n in content if n.endswith((".so", ".pyd", ".c", ".cpp", ".cu", ".pyx"))]


def test_wheel_holds_the_package_and_nothing_else(content):
    tops = {name.partition("/")[0] for name in content}
    assert tops == {"dynmask", f"dynmask-{dynmask.__version__}.dist-info"}
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("dynmask/**/*.py")}
    assert sources == {n for n in content if n.endswith(".py")}
    needed = ["py.typed", "eval/words.txt", "report/page.css", "assets/LICENSES.md"]
    assert {f"dynmask/{name}" for name in needed} <= set(content)
    recipes = {path.name for path in ROOT.glob("dynmask/train/recipes/*.yaml")}
    assert recipes
    assert recipes == {Path(n).name for n in content if n.startswith("dynmask/train/recipes/")}
    assert sum(map(len, content.values())) < 40 * 2**20


def test_embedded_files_are_whole(content):
    for line in content["dynmask/assets/SHA256SUMS"].decode().splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256(content[f"dynmask/assets/{name}"]).hexdigest() == digest, name


def test_metadata(metadata, content):
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert len(metadata.get_all("License-File")) == 2
    needed = metadata.get_all("Requires-Dist")
    always = {re.match(r"[\w-]+", line)[0] for line in needed if "extra ==" not in line}
    assert always == {"torch", "numpy", "safetensors", "triton"}
    # Triton has wheels for Linux alone: elsewhere nobody may be asked to build it.
    (triton,) = (line for line in needed if line.startswith("triton"))
    assert "sys_platform == 'linux'" in triton.replace('"', "'")
    entry = content[f"dynmask-{dynmask.__version__}.dist-info/entry_points.txt"].decode()
    assert "dynmask = dynmask.cli:main" in entry


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """``installed(arguments)`` runs python in an empty folder, with the wheel before all else."""
    site = tmp_path_factory.mktemp("site")
    command = [*PIP, "install", "--no-deps", "--no-index", "-q", "--target", site, wheel]
    subprocess.run(command, check=True)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    env = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            cwd=elsewhere,
            env=env,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.site = site
    return run


def test_doctor_finds_the_installed_wheel_whole(installed):
    where = installed("-c", "import dynmask; print(dynmask.__file__)").strip()
    assert Path(where).is_relative_to(installed.site)
    found = json.loads(installed("-m", "dynmask", "doctor", "--json").splitlines()[-1])
    assert found["ok"]
    assert {c["name"] for c in found["checks"] if c["ok"]} >= {"embedded files", "embedded model"}


def test_installed_wheel_evaluates(installed):
    options = ["--lines", "10", "--n", "2", "--questions", "2", "--json"]
    printed = installed("-m", "dynmask", "eval", "longeval", *options)
    (result,) = json.loads(printed.splitlines()[-1])["quality"]
    assert (result["n"], result["score"]) == (2, 1.0)
