"""The versions that dynmask supports, each session in an environment of its own: ``make matrix``.

``nox -l`` lists the sessions, ``nox -s oldest`` runs one. They install the built wheel and run the
tests that torch, transformers and the other libraries beneath can break. A Python that is not on
the machine is skipped, and nox says so. ``docs/guide/install.md`` has what each session found.
"""

import re
import tomllib
from pathlib import Path

import nox

ROOT = Path(__file__).parent
# The oldest that pyproject.toml allows, and those that the pinned torch has wheels for.
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
EXTRAS = ["hf", "report", "train"]
# Left out: kernels and the command, which the whole suite runs with the pinned versions.
TESTS = [
    "tests/assets",
    "tests/baselines",
    "tests/dma",
    "tests/hf",
    "tests/ops/test_api.py",
    "tests/ops/test_backends.py",
    "tests/ops/test_bounded.py",
    "tests/ops/test_cpu_lifetimes.py",
    "tests/ops/test_equalities.py",
    "tests/ops/test_flex.py",
    "tests/ops/test_gradients.py",
    "tests/ops/test_mask_kinds.py",
    "tests/report/test_page.py",
    "tests/report/test_results.py",
    "tests/test_features.py",
    "tests/test_public_api.py",
    "tests/train",
]

# nox may be set up to use uv, which does not read pip's configuration.
nox.options.default_venv_backend = "virtualenv"


def pinned() -> dict[str, str]:
    """Return what constraints.txt pins, by name."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))


def oldest() -> dict[str, str]:
    """Return the oldest version that pyproject.toml allows of each dependency, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + [line for extra in EXTRAS for line in extras[extra]]
    found = (re.match(r"([\w.-]+)>=([\w.]+)", line) for line in asked)
    return {match[1]: match[2] for match in found if match}


def run(session: nox.Session, constraints: dict[str, str]) -> None:
    """Install the wheel and what runs the tests under constraints, and run the tests."""
    folder = Path(session.create_tmp())
    lines = "".join(f"{name}=={version}\n" for name, version in constraints.items())
    (folder / "constraints.txt").write_text(lines, encoding="utf-8")
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    session.run("python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    tools = [f"{name}=={pinned()[name]}" for name in ("pytest", "pytest-xdist", "hypothesis")]
    wanted = f"{wheel}[{','.join(EXTRAS)}]"
    session.install("-c", str(folder / "constraints.txt"), wanted, *tools)

    session.chdir(folder)  # so that no process finds the checkout's own dynmask
    session.run("python", "-m", "pip", "list")
    session.run("dynmask", "doctor")
    here = "import dynmask, sys; sys.exit(not dynmask.__file__.startswith(sys.prefix))"
    session.run("python", "-c", here)
    tests = [str(ROOT / test) for test in TESTS]
    options = ["-n", "auto", "--maxprocesses", "8", "-q", "-c", str(ROOT / "pyproject.toml")]
    env = {"OMP_NUM_THREADS": "1"}
    session.run("pytest", *options, *session.posargs, *tests, env=env)


@nox.session(python=PYTHONS[0], name="oldest")
def oldest_of_all(session: nox.Session) -> None:
    """Run with the oldest version of everything that pyproject.toml allows."""
    # pip would take pyarrow 26 for old datasets, which then asks for numpy 2 at import.
    run(session, {"pyarrow": "17.0.0"} | oldest())


@nox.session
def oldest_transformers(session: nox.Session) -> None:
    """Run with the oldest transformers and else the pinned versions, as CI does."""
    # The oldest transformers wants a huggingface_hub before 2.
    old = {"transformers": oldest()["transformers"], "huggingface_hub": "1.33.0"}
    run(session, pinned() | old)


@nox.session(python=PYTHONS)
def current(session: nox.Session) -> None:
    """Run with the versions of constraints.txt."""
    run(session, pinned())


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """Run with the newest versions that pip finds."""
    run(session, {})
