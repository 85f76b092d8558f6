"""``dynmask bench`` as a command."""

import json

import pytest

pytest.importorskip("rich")

import dynmask.bench.run
from dynmask.bench.engine import Engine
from dynmask.cli import BAD_INPUT, FAILED, OK, main

TINY = ["--device", "cpu", "--impl", "reference", "--lengths", "65", "40", "--keep", "8"]
TINY += ["--rounds", "1", "--warmups", "1"]


def call(capsys, *words):
    code = main(["bench", *words, "--json"])
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    return code, json.loads(out), err


@pytest.mark.parametrize("benchmark", ["op", "select", "decode", "backward", "table2"])
def test_measures_and_writes(capsys, monkeypatch, tmp_path, benchmark):
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "deep" / "results.json"
    code, document, err = call(capsys, benchmark, *TINY, "--out", str(out))
    assert code == OK
    assert json.loads(out.read_text()) == document
    assert [cell["length"] for cell in document["cells"]][:: len(document["cells"]) - 1] == [40, 65]
    assert max(map(len, err.splitlines())) <= 80
    assert [path.name for path in out.parent.iterdir()] == ["results.json"]  # no temporary left


def test_results_are_kept_when_interrupted(capsys, monkeypatch, tmp_path):
    cells = dynmask.bench.run._CELLS["select"]

    def interrupted(settings, engine, clock, length):
        if length == 65:
            raise KeyboardInterrupt
        return cells(settings, engine, clock, length)

    monkeypatch.setitem(dynmask.bench.run._CELLS, "select", interrupted)
    out = tmp_path / "results.json"
    code, _, _ = call(capsys, "select", *TINY, "--out", str(out))
    assert code == 130
    kept = json.loads(out.read_text())
    assert {cell["length"] for cell in kept["cells"]} == {40}
    assert not kept["complete"]


def test_a_wrong_result_is_exit_code_1(capsys, monkeypatch, tmp_path):
    right = Engine.named("reference")
    wrong = Engine("wrong", right.select, lambda *given: right.attend(*given) + 0.01)
    monkeypatch.setattr(dynmask.bench.run, "engine_for", lambda settings: wrong)
    out = tmp_path / "results.json"
    code, document, err = call(capsys, "op", *TINY, "--out", str(out))
    assert code == FAILED
    assert {cell["status"] for cell in document["cells"]} == {"error"}
    assert "ERROR 40 tokens normal: attention: row 0" in err
    assert json.loads(out.read_text()) == document


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scores", "frob"], "frob"),
        (["--keep", "0"], "keep=0"),
        (["--impl", "frob"], "frob"),
        (["--heads", "3", "--groups", "2"], "heads=3"),
        (["--lengths", "1"], "lengths"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_is_exit_code_2(capsys, words, message):
    code, document, _ = call(capsys, "op", *TINY, *words)
    assert code == BAD_INPUT
    assert message in document["error"]


def test_out_that_cannot_be_written_is_told_before_the_work(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, document, _ = call(capsys, "op", *TINY, "--out", str(tmp_path / "file" / "x.json"))
    assert code == BAD_INPUT
    assert "--out" in document["error"]


def test_page(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    results = str(tmp_path / "op.json")
    assert main(["bench", "op", *TINY, "--out", results]) == OK
    capsys.readouterr()
    folder = tmp_path / "page"
    code, document, _ = call(capsys, "page", "--results", results, "--out", str(folder))
    assert code == OK
    assert sorted(path.name for path in folder.iterdir()) == document["files"]
    assert "README.md" in document["files"]
    code, document, _ = call(capsys, "page", "--results", __file__, "--out", str(folder))
    assert code == BAD_INPUT
    assert __file__ in document["error"]


def test_a_benchmark_must_be_named(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench"])
    assert caught.value.code == BAD_INPUT
