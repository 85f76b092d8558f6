"""The ``dynmask`` command on a tiny random model, in this process and as a real one."""

import dataclasses
import hashlib
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

from dynmask.cli import BAD_INPUT, COMMANDS, FAILED, INTERRUPTED, OK, main  # noqa: E402
from dynmask.cli.inputs import read_texts  # noqa: E402
from dynmask.dam import MaskPlan  # noqa: E402

WORDS = "the quick brown fox jumps over the lazy dog and runs away from it at once. "
SETTINGS = ["--capture-length", "64", "--tau", "0.05", "--mu", "0.5", "--device", "cpu"]


def tiny_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*alphabet, "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def tiny_model(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=256,
    )
    return transformers.LlamaForCausalLM(config).eval()


def save_model(folder, seed=0):
    tiny_model(seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [json.dumps({"text": f"Text {index}. {WORDS * 8}"}) for index in range(4)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def plan(tmp_path_factory, model, texts):
    out = str(tmp_path_factory.mktemp("plans") / "plan")
    assert main(["calibrate", "--model", model, "--texts", texts, "--out", out, *SETTINGS]) == OK
    return out


def call(capsys, *words):
    """Run with --json; return the exit code, the document and what went to standard error."""
    code = main(["--json", *words])
    out, err = capsys.readouterr()
    assert out.count("\n") == 1, out
    return code, json.loads(out), err


def shell(folder, *words):
    """Run the command as a user does, and check that its output suits 80 columns."""
    done = subprocess.run(
        [sys.executable, "-m", "dynmask", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "2", "COLUMNS": "80"},
    )
    assert done.returncode == OK, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout
    return done.stdout


def test_whole_way(monkeypatch, tmp_path, model, texts):
    """Calibrate, inspect, evaluate twice, report; the first and the last as real processes."""
    monkeypatch.chdir(tmp_path)
    shell(tmp_path, "calibrate", "--model", model, "--texts", texts, "--out", "plan", *SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]
    task = ["eval", "longeval", "--model", model, "--device", "cpu", "--lines", "8"]
    task += ["--n", "2", "--questions", "2"]
    assert main(["inspect", "plan"]) == OK
    assert main([*task, "--out", "full.json"]) == OK
    assert main([*task, "--plan", "plan", "--mode", "static", "--out", "static.json"]) == OK
    results = ["--results", "full.json", "static.json"]
    assert "r.html" in shell(tmp_path, "report", "--plan", "plan", *results, "--out", "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count("<img ") == 2  # One for each layer.
    assert "DAM static" in page
    assert "LongEval, 8 lines" in page


def test_calibrate_json_is_the_plan(capsys, tmp_path, model, texts):
    out = tmp_path / "plan"
    code, document, _ = call(
        capsys, "calibrate", "--model", model, "--texts", texts, "--out", str(out), *SETTINGS
    )
    assert code == OK
    loaded = MaskPlan.load(out)
    assert document["settings"] == loaded.settings.to_dict()
    assert document["settings"]["capture_length"] == 64
    assert document["settings"]["mu"] == 0.5
    assert document["plan"] == str(out)


def test_inspect_gives_the_lengths_asked_for(capsys, plan):
    code, document, err = call(capsys, "inspect", plan, "--length", "100", "3000")
    assert code == OK
    loaded = MaskPlan.load(plan)
    expected = {str(n): float(loaded.density(n, "static").mean()) for n in (100, 3000)}
    assert document["density"]["static"] == pytest.approx(expected)
    assert "3,000 tokens" in err


def test_inspect_shows_every_layer_in_80_columns(capsys, monkeypatch, plan):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["inspect", plan, "--length", "4096", "16384", "65536", "131072"]) == OK
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if " of 4 " in line]
    assert [row[0] for row in rows] == ["0", "1"]
    assert all(len(row) == 11 for row in rows)  # "1 of 4" is three words
    assert "131,072 tokens" in lines[-1]


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(["longeval", "--lines", "8", "--n", "2", "--questions", "2"], id="longeval"),
        pytest.param(["needle", "--length", "900", "--n", "2", "--needles", "2"], id="needle"),
        pytest.param(
            ["recall", "--lines", "8", "--n", "2", "--questions", "2", "--filler", "70"],
            id="recall-lines",
        ),
        pytest.param(
            ["recall", "--kind", "ruler", "--length", "2600", "--n", "2", "--filler", "70"],
            id="recall-ruler",
        ),
        pytest.param(["perplexity", "--length", "128", "--windows", "2"], id="perplexity"),
    ],
)
@pytest.mark.parametrize("mode", ["full", "static", "auto", "dense"])
def test_eval_every_task_in_every_mode(capsys, tmp_path, model, plan, task, mode):
    words = ["eval", *task, "--model", model, "--device", "cpu", "--mode", mode]
    if task[0] != "longeval":
        text = tmp_path / "text.txt"
        text.write_text(WORDS * 40)
        words += ["--texts", str(text)]
    if mode != "full":
        words += ["--plan", plan]
    code, document, _ = call(capsys, *words)
    assert code == OK
    (row,) = document["quality"]
    assert (row["mode"], row["n"]) == (mode, 2)
    assert row["seconds"] > 0
    assert 0 < row["density"] <= row["computed"] <= 1
    if mode in ("full", "dense"):
        assert row["density"] == 1
    if mode == "static":
        assert row["density"] < 1


def test_density_of_a_dma_model_comes_with_a_note(capsys, tmp_path):
    from dynmask import DmaConfig, DmaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "keep": 8}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 257}
    DmaForCausalLM(DmaConfig(**shape)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    words = ["eval", "perplexity", "--model", str(tmp_path), "--length", "64", "--windows", "1"]
    assert main(words) == OK
    assert "DMA model leaves out by itself" in " ".join(capsys.readouterr().out.split())


def test_dense_mode_gives_the_full_score(capsys, tmp_path, model, plan):
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 10)
    common = ["eval", "perplexity", "--model", model, "--device", "cpu", "--length", "128"]
    common += ["--windows", "1", "--texts", str(text)]
    scores = {}
    for mode, extra in (
        ("full", []),
        ("dense", ["--plan", plan]),
        ("dense", []),
        ("static", ["--plan", plan]),
    ):
        _, document, _ = call(capsys, *common, "--mode", mode, *extra)
        scores.setdefault(mode, []).append(document["quality"][0]["score"])
    assert scores["dense"] == pytest.approx(scores["full"] * 2, rel=1e-4)
    assert scores["static"] != pytest.approx(scores["full"], rel=1e-6)


def hurt(plan, folder, name, change):
    """Copy a plan and change one of its files."""
    folder.mkdir()
    for path in Path(plan).iterdir():
        content = path.read_bytes()
        (folder / path.name).write_bytes(change(content) if path.match(name) else content)
    return str(folder)


# Arguments with places to fill in, split at spaces, and a part of the message.
BAD = {
    "missing-model": ("calibrate --model ./absent --texts {texts} --out {tmp}/p", "no such folder"),
    "empty-model": ("calibrate --model {tmp}/empty --texts {texts} --out {tmp}/p", "cannot load"),
    "missing-texts": ("calibrate --texts {tmp}/no.txt --out {tmp}/p", "no.txt"),
    "text-kind": ("calibrate --texts {tmp}/a.pdf --out {tmp}/p", ".jsonl"),
    "short-texts": ("calibrate --model {model} --texts {tmp}/short.txt --out {tmp}/p", "1024"),
    "tau": ("calibrate --tau 7 --out {tmp}/p", "tau=7"),
    "mu": ("calibrate --mu 0 --out {tmp}/p", "mu=0"),
    "amplify": ("calibrate --amplify cube --out {tmp}/p", "cube"),
    "capture-length": (
        "calibrate --model {model} --texts {texts} --capture-length 5000 --out {tmp}/p",
        "capture_length=5000",
    ),
    "batch-size": ("calibrate --batch-size 0 --out {tmp}/p", "--batch-size"),
    "out-is-a-file": ("calibrate --out {tmp}/short.txt", "short.txt"),
    "out-below-a-file": ("calibrate --out {tmp}/short.txt/p", "short.txt"),
    "missing-plan": ("inspect {tmp}/absent", "absent"),
    "length": ("inspect {plan} --length 0", "--length 0"),
    "cut-plan": ("inspect {cut}", "plan.json"),
    "changed-plan": ("inspect {changed}", "sha256"),
    "cut-tensors": ("inspect {tensors}", "tensors-"),
    "other-model": ("eval longeval --model {other} --plan {plan} --lines 4", "another model"),
    "mode-without-plan": ("eval longeval --mode static", "--plan"),
    "plan-with-full": ("eval longeval --mode full --plan {plan}", "--mode full"),
    "eval-n": ("eval longeval --model {model} --n 0", "n=0"),
    "eval-too-long": ("eval longeval --model {model} --lines 900", "context"),
    "eval-out": ("eval longeval --out {tmp}/short.txt/r.json", "--out"),
    "report-results": (
        "report --plan {plan} --results {tmp}/short.txt --out {tmp}/r.html",
        "not JSON",
    ),
    "report-out": ("report --plan {plan} --out {tmp}/short.txt/r.html", "--out"),
    "eval-out-is-a-folder": ("eval longeval --out {tmp}/empty", "is a folder"),
    "report-out-is-a-folder": ("report --plan {plan} --out {plan}", "is a folder"),
    "other-tokenizer": ("eval longeval --model {small} --lines 4", "has 257 tokens, the model 9"),
    "no-tokenizer": ("eval longeval --model {bare} --lines 4", "makes no tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_exit_code_2_and_one_sentence(case, capsys, tmp_path, model, texts, plan):
    words, expected = BAD[case]
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "empty").mkdir()
    if "{bare}" in words or "{small}" in words:
        # A Qwen3 without files of a tokenizer gets an empty one.
        bare = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
        bare |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 9}
        qwen = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**bare))
        qwen.save_pretrained(tmp_path / "bare")
        qwen.save_pretrained(tmp_path / "small")
        tiny_tokenizer().save_pretrained(tmp_path / "small")
    places = {
        "tmp": str(tmp_path),
        "model": model,
        "texts": texts,
        "plan": plan,
        "cut": hurt(plan, tmp_path / "cut", "*.json", lambda b: b[: len(b) // 2]),
        "changed": hurt(plan, tmp_path / "changed", "*.json", lambda b: b.replace(b"0.5", b"0.6")),
        "tensors": hurt(plan, tmp_path / "tensors", "*.safetensors", lambda b: b[:-9]),
        "other": save_model(tmp_path / "other", seed=1) if "{other}" in words else "",
        "bare": str(tmp_path / "bare"),
        "small": str(tmp_path / "small"),
    }
    before = sorted(path.name for path in tmp_path.iterdir())
    code, document, err = call(capsys, *(word.format(**places) for word in words.split()))
    assert code == BAD_INPUT
    assert document["exit_code"] == BAD_INPUT
    assert expected in document["error"]
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before  # nothing half made


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([], id="nothing"),
        pytest.param(["frob"], id="unknown-command"),
        pytest.param(["eval", "frob"], id="unknown-task"),
        pytest.param(["eval", "longeval", "--mode", "frob"], id="unknown-mode"),
        pytest.param(["calibrate"], id="no-out"),
        pytest.param(["calibrate", "--out", "p", "--tau", "much"], id="tau-is-no-number"),
    ],
)
def test_usage_errors_are_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == BAD_INPUT
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=["top", *COMMANDS])
def test_help_names_the_exit_codes(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*words, "--help"])
    assert caught.value.code == OK
    out = capsys.readouterr().out
    for code in (OK, FAILED, BAD_INPUT, INTERRUPTED):
        assert f"\n  {code} " in out


def test_help_does_not_load_torch():
    code = "import sys, dynmask.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'rich', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=600)


def test_json_may_stand_after_the_command(capsys, plan):
    assert main(["inspect", plan, "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["heads"] == 8
    assert main(["--json", "inspect", plan]) == OK
    assert json.loads(capsys.readouterr().out)["heads"] == 8


def test_markup_in_a_name_is_printed_as_it_is(capsys, tmp_path):
    assert main(["inspect", str(tmp_path / "[bold]x[/bold]")]) == BAD_INPUT
    assert "[bold]x[/bold]" in capsys.readouterr().err.replace("\n", "")


def test_unexpected_error_is_exit_code_1_and_debug_shows_where(capsys, monkeypatch, plan):
    def broken(folder):
        raise RuntimeError("boom")

    monkeypatch.setattr(MaskPlan, "load", broken)
    code, document, err = call(capsys, "inspect", plan)
    assert code == FAILED
    assert "RuntimeError: boom" in document["error"]
    assert "Traceback" not in err
    _, _, err = call(capsys, "inspect", plan, "--debug")
    assert "Traceback" in err


def test_interrupted_calibration_resumes(capsys, monkeypatch, tmp_path, model, texts):
    """The second run must not do the first layer again, and must end with the same plan."""
    from dynmask.hf.stream import LayerStream

    consumed = []
    step = LayerStream.step

    def interrupted(self, depth, batch, hidden, consumer=None, *, most_rows=None):
        if depth == 1:
            raise KeyboardInterrupt
        return step(self, depth, batch, hidden, consumer, most_rows=most_rows)

    def counted(self, depth, batch, hidden, consumer=None, *, most_rows=None):
        if consumer is not None:
            consumed.append(depth)
        return step(self, depth, batch, hidden, consumer, most_rows=most_rows)

    def words(name):
        out = str(tmp_path / name)
        return ["calibrate", "--model", model, "--texts", texts, "--out", out, *SETTINGS]

    monkeypatch.setattr(LayerStream, "step", interrupted)
    code, document, _ = call(capsys, *words("plan"))
    assert (code, document["exit_code"]) == (INTERRUPTED, INTERRUPTED)
    assert not (tmp_path / "plan").exists()

    monkeypatch.setattr(LayerStream, "step", counted)
    assert main(words("plan")) == OK
    assert set(consumed) == {1}
    assert main(words("whole")) == OK
    resumed, whole = MaskPlan.load(tmp_path / "plan"), MaskPlan.load(tmp_path / "whole")
    for index, layer in whole.layers.items():
        assert torch.equal(resumed.layers[index].corner, layer.corner)
        assert torch.equal(resumed.layers[index].coverage, layer.coverage)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan", "whole"]


def test_texts_are_read_from_every_kind_of_file(tmp_path):
    record = json.dumps({"text": "två", "more": 1}) + "\n\n" + json.dumps({"text": "tre"})
    (tmp_path / "a.txt").write_text("ett", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(record, encoding="utf-8")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"fyra"))
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(record.encode()))
    names = ["a.txt", "b.jsonl", "a.txt.xz", "b.jsonl.xz"]
    texts = read_texts([str(tmp_path / name) for name in names])
    assert texts == ["ett", "två", "tre", "fyra", "två", "tre"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        pytest.param("a.jsonl", b"{", "line 1: not JSON", id="json"),
        pytest.param("a.jsonl", b'{"text": "x"}\n{"body": 1}', 'line 2: needs .* "text"', id="key"),
        pytest.param("a.jsonl", b'{"text": 5}', 'line 1: needs .* "text"', id="type"),
        pytest.param("a.txt.xz", b"plain", "damaged", id="xz"),
        pytest.param("a.txt", b"\xff\xfe\x00", "damaged", id="utf-8"),
        pytest.param("a.txt", b" \n", "no text", id="empty"),
    ],
)
def test_bad_texts_name_the_file_and_the_line(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_texts([str(tmp_path / name)])
    assert name in str(caught.value)


def test_prefill_rows_pair_the_ratios_and_alternate(monkeypatch, plan):
    from dynmask.report import measure

    order = []
    seconds = {"full": [9.0, 2.0, 4.0], "static": [9.0, 1.0, 1.0], "auto": [9.0, 4.0, 2.0]}

    def fake(model, plan, ids, mode):
        order.append(mode)
        return seconds[mode].pop(0), measure.Cost(0.5, 0.6, "fake")

    monkeypatch.setattr(measure, "_prefill", fake)
    monkeypatch.setattr(measure, "baseline_name", lambda model: "fake")
    rows = measure.prefill_rows(None, None, [1, 2], modes=("static", "auto"), repeats=2)
    assert order == ["full", "static", "auto", "static", "auto", "full", "auto", "full", "static"]
    assert [row.mode for row in rows] == ["full", "static", "auto"]
    assert [row.ratio for row in rows] == [1.0, 3.0, 1.25]  # the first round does not count
    assert rows[1].ratio_spread == (2.0, 4.0)
    assert rows[2].spread == (2.0, 4.0)
    with pytest.raises(ValueError, match="repeats=0"):
        measure.prefill_rows(None, None, [1], modes=(), repeats=0)


def test_doctor_finds_what_is_here(capsys):
    code, document, _ = call(capsys, "doctor")
    checks = {check["name"]: check for check in document["checks"]}
    assert code == OK, document
    assert checks["torch"]["text"] == torch.__version__
    assert checks["backend reference"]["ok"]
    assert checks["embedded model"]["ok"]


def test_changed_and_missing_files_are_found(tmp_path):
    from dynmask.cli.doctor import wrong_sums

    content = {"a/one.bin": b"1", "two.bin": b"2", "three.bin": b"3"}
    (tmp_path / "a").mkdir()
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in content.items()]
    (tmp_path / "SHA256SUMS").write_text("".join(lines))
    assert wrong_sums(tmp_path) == []
    (tmp_path / "a" / "one.bin").write_bytes(b"0")
    (tmp_path / "three.bin").unlink()
    assert wrong_sums(tmp_path) == ["a/one.bin", "three.bin"]


def test_doctor_survives_a_check_that_breaks(capsys, monkeypatch):
    from dynmask.cli import doctor

    def backends():
        yield doctor.Finding("first", True, "here")
        raise OSError("no driver")

    monkeypatch.setattr(doctor, "CHECKS", (backends, doctor.computer))
    code, document, _ = call(capsys, "doctor")
    assert code == FAILED
    names = [(check["name"], check["ok"]) for check in document["checks"]]
    assert names[:2] == [("first", True), ("backends", False)]
    assert ("processor", None) in names


def test_demo_writes_plan_results_and_report(capsys, monkeypatch, tmp_path):
    """The demo's whole way on a random model, so that the test is quick."""
    from dynmask.cli import demo
    from dynmask.cli.inputs import Loaded
    from dynmask.report import Results

    texts = [f"Text {index}. {WORDS * 30}" for index in range(4)]
    tiny = Loaded(tiny_model(), tiny_tokenizer(), "tiny")
    monkeypatch.setattr(demo, "load", lambda name, *, device: tiny)
    monkeypatch.setattr(demo, "load_texts", lambda purpose: texts)
    sizes = dataclasses.replace(
        demo.QUICK,
        capture_length=64,
        lines=6,
        line_questions=2,
        questions_per_record=2,
        recall_questions=2,
        needle_length=700,
        needle_questions=2,
        needles=2,
        perplexity_length=128,
        prefill_lengths=(96, 160),
        repeats=1,
    )
    monkeypatch.setattr(demo, "QUICK", sizes)
    out = tmp_path / "out"
    code, document, err = call(capsys, "demo", "--quick", "--out", str(out))
    assert code == OK, err
    assert sorted(path.name for path in out.iterdir()) == ["plan", "report.html", "results.json"]
    results = Results.load(out / "results.json")
    assert [row["task"] for row in document["quality"]] == [row.task for row in results.quality]
    assert len(results.quality) == 4 * len(demo.MODES)
    assert len(results.speed) == 2 * len(demo.MODES)
    assert {row.mode for row in results.quality} == set(demo.MODES)
    plan = MaskPlan.load(out / "plan")
    assert plan.settings.capture_length == 64
    assert (out / "report.html").read_text().count("<img ") == 2
    assert max(map(len, err.splitlines())) <= 80
