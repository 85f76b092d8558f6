"""What `dynmask` is given by others: model folders, texts, names; and an output that fails."""

from __future__ import annotations

import json
import lzma
import os
import pickle
import subprocess
import sys

import pytest
import torch

from dynmask.cli import BAD_INPUT, FAILED, OK, inputs, main
from dynmask.cli.console import visible
from dynmask.dam import MaskPlan


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def edit(name, **changes):
    def change(folder, trace):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def truncated(folder, trace):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def huge_header(folder, trace):
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 7 + b"\x7f" + path.read_bytes()[8:])


def deep_config(folder, trace):
    (folder / "config.json").write_text("[" * 100_000)


def latin_config(folder, trace):
    (folder / "config.json").write_bytes(b'{"model_type": "ll\xe9"}')


def pickled(folder, trace):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Payload(trace)}))


def pickled_by_torch(folder, trace):
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload(trace)}, folder / "pytorch_model.bin")


def own_code(name, **entries):
    """Point a configuration to code in the folder."""

    def change(folder, trace):
        edit(name, **entries)(folder, trace)
        (folder / "evil.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n")

    return change


CLASSES = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
MODELS = {
    "truncated weights": truncated,
    "header of 2^63": huge_header,
    "other shapes": edit("config.json", hidden_size=64),
    "size is text": edit("config.json", hidden_size="x"),
    "no heads": edit("config.json", num_attention_heads=0),
    "deep configuration": deep_config,
    "other encoding": latin_config,
    "tokenizer of nothing": lambda folder, trace: (folder / "tokenizer.json").write_text("{}"),
    "pickle": pickled,
    "pickle of torch.save": pickled_by_torch,
    "own model code": own_code("config.json", model_type="evil", auto_map=CLASSES),
    "own tokenizer code": own_code(
        "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
    ),
}


@pytest.mark.parametrize("change", MODELS.values(), ids=MODELS)
def test_a_bad_model_is_bad_input_and_none_of_its_code_runs(
    capsys, monkeypatch, tmp_path, model_folder, change
):
    # Had transformers asked, "y" would have been the answer.
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    trace = tmp_path / "trace"
    change(model_folder, trace)
    words = ["calibrate", "--model", str(model_folder), "--out", str(tmp_path / "plan"), "--json"]
    assert main(words) == BAD_INPUT
    out, err = capsys.readouterr()
    assert "transformers cannot load it" in json.loads(out.splitlines()[-1])["error"]
    assert "Traceback" not in err
    assert not trace.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_the_payload_would_have_shown(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "trace")))
    assert (tmp_path / "trace").is_dir()


TEXTS = {
    "deep": ("a.jsonl", b"[" * 200_000, "line 1: not JSON"),
    "many digits": ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
    "surrogate": ("a.jsonl", b'{"text": "x"}\n{"text": "\\udc00"}', "line 2: half a surrogate"),
    "list": ("a.jsonl", b'["text"]', "needs a string"),
    "latin-1": ("a.txt", b"caf\xe9", "damaged"),
    "half an xz": ("a.txt.xz", lzma.compress(b"text" * 99)[:-20], "damaged"),
    "no xz": ("a.txt.xz", b"text", "damaged"),
    "too long": ("a.txt", b"x" * 1001, "split the file"),
    "xz that unfolds": ("a.txt.xz", lzma.compress(bytes(10**6)), "split the file"),
}


@pytest.mark.parametrize(("name", "content", "message"), TEXTS.values(), ids=TEXTS)
def test_hostile_texts_name_the_file(monkeypatch, tmp_path, name, content, message):
    if message == "split the file":
        monkeypatch.setattr(inputs, "MAX_TEXT_BYTES", 1000)
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"--texts .*{name}.*{message}"):
        inputs.read_texts([str(path)])


def test_no_more_is_unpacked_than_is_allowed(monkeypatch, tmp_path):
    monkeypatch.setattr(inputs, "MAX_TEXT_BYTES", 1000)
    asked = []

    class File(lzma.LZMAFile):
        def read(self, size=-1):
            asked.append(size)
            return super().read(size)

    monkeypatch.setattr(lzma, "open", File)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(bytes(10**6)))
    with pytest.raises(ValueError, match="split"):
        inputs.read_texts([str(tmp_path / "a.txt.xz")])
    assert max(asked) <= 1001
    assert min(asked) >= 0


ESCAPES = "\x1b]52;c;aGk=\x07\x1b[2J\x9b31m\r\u202e\x00"


def test_names_cannot_steer_the_terminal(capsys, plan, tmp_path):
    hostile = MaskPlan(
        fingerprint={**plan.fingerprint, "architecture": f"Nice{ESCAPES}\ud800"},
        settings=plan.settings,
        data=plan.data,
        layers=plan.layers,
        created=ESCAPES,
        dynmask_version=ESCAPES,
    )
    hostile.save(tmp_path / "plan")
    assert main(["inspect", str(tmp_path / "plan")]) == OK
    assert main(["inspect", str(tmp_path / f"absent{ESCAPES[:-1]}")]) == BAD_INPUT
    out, err = capsys.readouterr()
    assert "Nice\\x1b]52" in out.replace("\n", "")
    assert "absent\\x1b]52" in err.replace("\n", "")
    for letter in "\x1b\x07\x9b\r\u202e\x00":
        assert letter not in out + err


def test_what_is_shown_as_it_is():
    text = "Größe\tτ ≥ 0.5\nالعربية 日本語 🙂\u00a0–"
    assert visible(text) == text
    assert visible("a\x1bb\x7f\x85\u2066\udcff") == r"a\x1bb\x7f\x85\u2066\udcff"


def run(words, **streams):
    return subprocess.run(
        [sys.executable, "-m", "dynmask", *words],
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
        check=False,
        **streams,
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_standard_output_is_one_sentence(plan, tmp_path):
    plan.save(tmp_path / "plan")
    with open("/dev/full", "w") as full:
        done = run(["inspect", str(tmp_path / "plan"), "--json"], stdout=full)
    assert done.returncode != OK
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_memory_that_runs_out_is_a_failure_and_no_traceback(capsys, monkeypatch):
    def load(folder):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MaskPlan, "load", load)
    assert main(["inspect", "plan", "--json"]) == FAILED
    out, err = capsys.readouterr()
    assert "out of memory" in json.loads(out)["error"]
    assert "Traceback" not in err
