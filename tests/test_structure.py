"""The rules of DESIGN.md that no type checker holds: who may import whom, and what is not used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dynmask

ROOT = Path(dynmask.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LAYERS = (
    "masks",
    "ops",
    "bench",
    "dam",
    "baselines",
    "hf",
    "dma",
    "assets",
    "eval",
    "train",
    "report",
    "cli",
)
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def calls(node_tree):
    """Dotted names of everything called, with the call: ``("torch.load", node)``."""
    return [(ast.unparse(n.func), n) for n in ast.walk(node_tree) if isinstance(n, ast.Call)]


def imports(node_tree):
    """Full names of all that is imported, inside functions too."""
    names = []
    for node in ast.walk(node_tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    for name, call in calls(node_tree):
        if name.endswith(("import_module", "__import__")):
            names += [a.value for a in call.args if isinstance(a, ast.Constant)]
    if "dynmask" in names:  # `import dynmask` gives what is then used of it
        names.remove("dynmask")
        used = {ast.unparse(n) for n in ast.walk(node_tree) if isinstance(n, ast.Attribute)}
        names += sorted(name for name in used if name.startswith("dynmask."))
    return names


def layer_of(path):
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else None


def wrong_imports(layer, names):
    """Those of ``names`` that a file of ``layer`` must not import."""
    wrong = []
    for name in names:
        package, _, rest = name.partition(".")
        if package != "dynmask" or rest == "__version__":
            continue
        target = rest.partition(".")[0]
        if target not in LAYERS or LAYERS.index(target) > LAYERS.index(layer):
            wrong.append(name)
    return wrong


def test_every_folder_is_a_layer():
    folders = {layer_of(path) for path in FILES} - {None}
    assert folders == set(LAYERS)


def test_design_states_the_same_order():
    design = ROOT.parent / "DESIGN.md"
    assert " <- ".join(LAYERS) in design.read_text(encoding="utf-8")


def test_the_map_has_a_line_for_every_folder():
    design = (ROOT.parent / "DESIGN.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in design.splitlines() if line.startswith("| `")}
    assert list(rows) == [f"dynmask/{layer}" for layer in LAYERS]
    for folder in sorted(path for path in ROOT.glob("*/*/") if path.name != "__pycache__"):
        assert f"`{folder.name}/`" in rows[f"dynmask/{folder.parent.name}"], folder
    beside = design.split("Beside the package:")[1].split("\n\n")[0]
    for folder in ("tests", "fuzz", "benchmarks", "examples", "docs"):
        assert f"`{folder}/`" in beside


@each_file
def test_imports_run_one_way(path):
    if layer_of(path) is not None:
        assert wrong_imports(layer_of(path), imports(tree(path))) == []


@pytest.mark.parametrize(
    ("layer", "source", "wrong"),
    [
        ("ops", "import dynmask.masks", []),
        ("ops", "from dynmask import __version__", []),
        ("ops", "import dynmask\ndynmask.__version__", []),
        ("ops", "import dynmask\ndynmask.calibrate()", ["dynmask.calibrate"]),
        ("ops", "import dynmask.dam.plan", ["dynmask.dam.plan"]),
        ("ops", "def f():\n    from dynmask.cli import main", ["dynmask.cli.main"]),
        ("ops", "from dynmask import hf", ["dynmask.hf"]),
        ("ops", "from dynmask import calibrate", ["dynmask.calibrate"]),
        ("eval", "importlib.import_module('dynmask.train')", ["dynmask.train"]),
    ],
)
def test_the_rule_finds_what_breaks_it(layer, source, wrong):
    assert wrong_imports(layer, imports(ast.parse(source))) == wrong


@each_file
def test_tensor_layers_know_no_transformers(path):
    if layer_of(path) in ("masks", "ops", "dam", "baselines"):
        packages = {name.partition(".")[0] for name in imports(tree(path))}
        assert not packages & {"transformers", "tokenizers", "matplotlib", "rich"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("dynmask", {"triton", "transformers", "matplotlib", "torch"}),
        ("dynmask.dam", {"transformers", "matplotlib"}),
        ("dynmask.assets", {"transformers", "matplotlib"}),
        ("dynmask.eval", {"transformers", "matplotlib"}),
    ],
)
def test_import_is_light(module, absent):
    code = f"import sys, {module}; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "dynmask" in loaded
    assert not loaded & absent


@each_file
def test_files_stay_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


@each_file
def test_only_the_command_prints(path):
    printing = [name for name, _ in calls(tree(path)) if name.rpartition(".")[2] == "print"]
    assert "print" not in printing
    assert not printing or layer_of(path) == "cli"


@each_file
def test_nothing_is_unpickled(path):
    parsed = tree(path)
    packages = {name.partition(".")[0] for name in imports(parsed)}
    assert not packages & {
        "pickle",
        "cPickle",
        "_pickle",
        "dill",
        "cloudpickle",
        "joblib",
        "shelve",
    }
    for name, call in calls(parsed):
        assert name not in ("torch.load", "torch.save", "numpy.load")
        if name == "np.load":
            given = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert given.get("allow_pickle") == "False"
