import json
import os
import struct
from pathlib import Path

import pytest
import torch
from plan_files import forge, forge_tensors, sign, tensors_file
from safetensors.torch import load_file, save

from dynmask.dam import MaskPlan, check_writable, store


@pytest.fixture
def folder(plan, tmp_path):
    plan.save(tmp_path / "plan")
    return tmp_path / "plan"


def body_of(folder):
    return json.loads((folder / "plan.json").read_text())


def snapshot(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("which", ["json", "tensors"])
def test_a_truncated_file_is_named(folder, which, share):
    path = folder / "plan.json" if which == "json" else tensors_file(folder)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=path.name):
        MaskPlan.load(folder)


@pytest.mark.parametrize("at", [0, 9, 0.5, -1], ids=str)
def test_a_flipped_byte_in_the_tensors_is_found(folder, at):
    path = tensors_file(folder)
    content = bytearray(path.read_bytes())
    content[int(at * len(content)) if isinstance(at, float) else at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name}: does not match its sha256"):
        MaskPlan.load(folder)


FIELDS = {
    "format": "other",
    "version": 2,
    "dynmask": "9.9",
    "created": "never",
    "fingerprint": {"architecture": "Other"},
    "settings": {},
    "data": {},
    "layers": [],
    "tensors": {},
    "sha256": "0" * 64,
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_changed_field_is_found(folder, name):
    body = body_of(folder)
    assert set(body) == set(FIELDS)
    (folder / "plan.json").write_text(json.dumps(body | {name: FIELDS[name]}))
    with pytest.raises(ValueError, match=r"plan\.json"):
        MaskPlan.load(folder)


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_found(folder, name):
    body = body_of(folder)
    del body[name]
    body = body if name == "sha256" else sign(body)
    (folder / "plan.json").write_text(json.dumps(body))
    with pytest.raises(ValueError, match=r"plan\.json"):
        MaskPlan.load(folder)


def test_a_changed_number_deep_inside_is_found(folder):
    text = (folder / "plan.json").read_text()
    assert '"tau": 0.01' in text
    (folder / "plan.json").write_text(text.replace('"tau": 0.01', '"tau": 0.04'))
    with pytest.raises(ValueError, match="its own sha256"):
        MaskPlan.load(folder)


def setting(name, value):
    return lambda body: body["settings"].update({name: value})


def layer(name, value):
    return lambda body: body["layers"][0].update({name: value})


FORGED = {
    "unknown key": (lambda body: body.update(extra=1), r"unknown \['extra'\]"),
    "version text": (lambda body: body.update(version="1"), "version '1'"),
    "version true": (lambda body: body.update(version=True), "version True"),
    "created number": (lambda body: body.update(created=5), "created has the wrong type"),
    "fingerprint list": (lambda body: body.update(fingerprint=[]), "fingerprint has the wrong"),
    "settings tau": (setting("tau", 9.0), "tau=9.0"),
    "settings tau text": (setting("tau", "0.1"), "tau='0.1'"),
    "settings tau null": (setting("tau", None), "tau=None"),
    "settings unknown": (setting("more", 1), r"unknown \['more'\]"),
    "settings amplify list": (setting("amplify", []), "amplify="),
    "settings length huge": (setting("capture_length", 2**62), "capture_length="),
    "settings length large": (setting("capture_length", 65536), "must be"),
    "settings length other": (setting("capture_length", 17), "layer 0: tensor 'corner' must be"),
    "data texts": (lambda body: body["data"].update(texts=-1), "data: texts"),
    "data unknown": (lambda body: body["data"].update(more=1), r"unknown \['more'\]"),
    "no layers": (lambda body: body.update(layers=[]), "layers has the wrong"),
    "layers object": (lambda body: body.update(layers={}), "layers has the wrong"),
    "layer number": (lambda body: body.update(layers=[3]), "layers must be an object"),
    "layer unknown": (layer("more", 1), r"unknown \['more'\]"),
    "layer index": (layer("layer", -1), "layer has the wrong type or range"),
    "layer index other": (layer("layer", 1), "layer 1: tensor 'corner' is missing"),
    "layer twice": (lambda body: body["layers"].append(body["layers"][0]), "is missing"),
    "layer removed": (lambda body: body["layers"].pop(), "unknown tensors"),
    "layer coverage range": (layer("coverage", [0.5, 1.5]), "coverage has the wrong"),
    "layer coverage text": (layer("coverage", ["1", "1"]), "coverage has the wrong"),
    "layer coverage heads": (layer("tail_coverage", [0.5]), "tail_coverage has 1 heads"),
    "layer gate number": (layer("gate", [0, 1]), "gate has the wrong"),
    "layer gate empty": (layer("gate", []), "gate has the wrong"),
    "tensors path": (lambda body: body["tensors"].update(file="../x.safetensors"), "file has the"),
    "tensors bytes": (lambda body: body["tensors"].update(bytes=1), "but 1 were written"),
    "tensors huge": (lambda body: body["tensors"].update(bytes=2**50), "bytes has the wrong"),
    "tensors hash": (lambda body: body["tensors"].update(sha256="0" * 64), "its sha256"),
    "tensors unknown": (lambda body: body["tensors"].update(more=1), r"unknown \['more'\]"),
}


@pytest.mark.parametrize(("change", "message"), FORGED.values(), ids=FORGED)
def test_a_forged_json_with_a_fitting_hash_is_refused(folder, change, message):
    forge(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        MaskPlan.load(folder)
    assert str(folder) in str(caught.value)


TEXTS = {
    "empty": b"",
    "list": b"[]",
    "binary": b"\xff\xfe\x00",
    "nan": b'{"format": NaN}',
    "infinite": b'{"format": "dynmask-plan", "version": 1, "data": 1e999}',
    "long number": b'{"a": ' + b"9" * 5000 + b"}",
    "deep": b"[" * 100_000,
    "key twice": b'{"format": "dynmask-plan", "format": "dynmask-plan"}',
    "not a plan": b'{"format": "other"}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_other_json_is_refused(folder, text):
    (folder / "plan.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"plan\.json: "):
        MaskPlan.load(folder)


def test_a_newer_version_is_named(folder):
    forge(folder, lambda body: body.update(version=2))
    with pytest.raises(ValueError, match=r"version 2.*reads version 1"):
        MaskPlan.load(folder)


def test_a_huge_json_is_not_read(folder):
    with (folder / "plan.json").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="1099511627776 bytes"):
        MaskPlan.load(folder)


def test_a_huge_tensors_file_is_not_read(folder):
    with tensors_file(folder).open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="1099511627776 bytes"):
        MaskPlan.load(folder)


@pytest.mark.parametrize("missing", ["folder", "json", "tensors"])
def test_what_is_missing_is_named(folder, missing):
    if missing == "folder":
        folder = folder.parent / "nowhere"
    else:
        (folder / "plan.json" if missing == "json" else tensors_file(folder)).unlink()
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        MaskPlan.load(folder)


def edit(name, value):
    return lambda tensors: tensors.update({name: torch.as_tensor(value)})


INT32 = torch.int32
TENSORS = {
    "missing": (lambda tensors: tensors.pop("0.corner"), "tensor 'corner' is missing"),
    "unknown": (edit("9.corner", [1]), "unknown tensors"),
    "dtype": (edit("0.columns.values", [0.0, 3.0, 11.0]), "'columns.values' must be"),
    "shape": (edit("0.columns.values", torch.zeros(3, 1, dtype=INT32)), "'columns.values' must"),
    "outside": (edit("0.columns.values", torch.tensor([0, 3, 16], dtype=INT32)), "must lie in"),
    "negative": (edit("0.columns.values", torch.tensor([-1, 3, 9], dtype=INT32)), "must lie in"),
    "unsorted": (edit("0.columns.values", torch.tensor([3, 0, 9], dtype=INT32)), "sorted"),
    "indptr start": (edit("0.columns.indptr", torch.tensor([1, 3, 3], dtype=INT32)), "partition"),
    "indptr end": (edit("0.columns.indptr", torch.tensor([0, 3, 9], dtype=INT32)), "partition"),
    "indptr falls": (edit("0.columns.indptr", torch.tensor([0, 5, 3], dtype=INT32)), "partition"),
    "indptr heads": (edit("0.columns.indptr", torch.tensor([0, 3], dtype=INT32)), "indptr' must"),
    "own token": (edit("0.offsets.values", torch.tensor([1, 2, 3, 4, 5], dtype=INT32)), "own tok"),
    "corner bits": (edit("0.corner", torch.zeros(2, 17, dtype=torch.uint8)), "own token"),
    "corner short": (edit("0.corner", torch.zeros(2, 16, dtype=torch.uint8)), "'corner' must be"),
    "previews": (edit("0.previews", torch.full((2, 2, 16, 16), torch.inf).half()), "finite"),
}


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS)
def test_forged_tensors_with_fitting_hashes_are_refused(folder, change, message):
    tensors = load_file(tensors_file(folder))
    change(tensors)
    forge_tensors(folder, save(tensors))
    with pytest.raises(ValueError, match=message):
        MaskPlan.load(folder)


def hostile(header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


HOSTILE = {
    "header of 2^60": struct.pack("<Q", 2**60) + b"{}",
    "no header": b"\0\0",
    "tensor of 2^60": hostile(
        {"0.corner": {"dtype": "U8", "shape": [2**30, 2**30], "data_offsets": [0, 2**60]}}
    ),
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_safetensors_are_refused(folder, content):
    forge_tensors(folder, content)
    with pytest.raises(ValueError, match="is no safetensors file"):
        MaskPlan.load(folder)


# writing --------------------------------------------------------------------------------------


def test_save_replaces_a_plan_and_leaves_nothing_behind(folder, plan):
    (folder / "notes.txt").write_text("mine")
    plan.with_coverage(1.0).save(folder)
    assert MaskPlan.load(folder).settings.coverage == 1.0
    assert len(list(folder.glob("tensors-*"))) == 1
    assert (folder / "notes.txt").read_text() == "mine"
    assert sorted(entry.name for entry in folder.parent.iterdir()) == ["plan"]


def test_save_again_writes_the_same_tensors(folder, plan):
    before = snapshot(folder)
    plan.save(folder)
    assert snapshot(folder) == before


@pytest.mark.parametrize("damage", ["json", "tensors"])
def test_a_damaged_plan_may_be_replaced(folder, plan, damage):
    (folder / "plan.json" if damage == "json" else tensors_file(folder)).write_bytes(b"{")
    plan.save(folder)
    MaskPlan.load(folder)


STEPS = {
    "tensors are written": ("_write_file", 1),
    "json is written": ("_write_file", 2),
    "files are synced": ("_sync_folder", 1),
    "tensors are in place": ("replace", 1),
    "json is put in place": ("replace", 2),
    "folder is renamed": ("rename", 1),
}


def interrupt(monkeypatch, name, nth, error):
    """Raise `error` instead of the n-th call of one step of a save."""
    home = store if name.startswith("_") else os
    real = getattr(home, name)
    calls = 0

    def step(*args):
        nonlocal calls
        calls += 1
        if calls == nth:
            raise error
        return real(*args)

    monkeypatch.setattr(home, name, step)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("step", [s for s in STEPS if s != "folder is renamed"])
def test_an_interrupted_save_leaves_the_old_plan(folder, plan, monkeypatch, step, error):
    with monkeypatch.context() as patch:
        interrupt(patch, *STEPS[step], error)
        with pytest.raises(type(error)):
            plan.with_coverage(1.0).save(folder)
    assert MaskPlan.load(folder).settings.coverage == 0.5
    assert not list(folder.glob(".dynmask*"))
    plan.with_coverage(1.0).save(folder)
    assert MaskPlan.load(folder).settings.coverage == 1.0


@pytest.mark.parametrize("step", [s for s in STEPS if "place" not in s])
def test_an_interrupted_first_save_leaves_nothing(plan, tmp_path, monkeypatch, step):
    interrupt(monkeypatch, *STEPS[step], OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        plan.save(tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_save_left_in_an_empty_folder_is_no_obstacle(plan, tmp_path):
    (tmp_path / ".dynmask-0123456789abcdef.tmp").mkdir()
    (tmp_path / "tensors-0123456789abcdef.safetensors").write_bytes(b"half")
    plan.save(tmp_path)
    MaskPlan.load(tmp_path)
    assert not (tmp_path / "tensors-0123456789abcdef.safetensors").exists()


@pytest.mark.parametrize("save_or_check", ["save", "check"])
@pytest.mark.parametrize("content", ["file", "other files", "other plan.json"])
def test_what_is_not_a_plan_is_not_overwritten(plan, tmp_path, content, save_or_check):
    target = tmp_path / "target"
    if content == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        name = "thesis.txt" if content == "other files" else "plan.json"
        (target / name).write_text('{"mine": 1}')
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"cannot write a plan to .*target"):
        plan.save(target) if save_or_check == "save" else check_writable(target)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("save_or_check", ["save", "check"])
def test_a_place_below_a_file_is_refused(plan, tmp_path, save_or_check):
    (tmp_path / "file").write_text("mine")
    target = tmp_path / "file" / "plan"
    with pytest.raises(ValueError, match=r"cannot write a plan to .*choose another"):
        plan.save(target) if save_or_check == "save" else check_writable(target)


def test_a_read_only_place_is_refused(plan, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match=r"Permission denied.*choose another folder"):
        check_writable(tmp_path / "new" / "plan")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(plan, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ValueError, match="choose another folder"):
            check_writable(tmp_path / "plan")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("place", ["new", "new/deep", "."])
def test_check_writable_leaves_no_trace(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    check_writable(place)
    check_writable(tmp_path / place)
    assert list(tmp_path.iterdir()) == []


def test_check_writable_accepts_a_plan(folder):
    before = snapshot(folder)
    check_writable(folder)
    assert snapshot(folder) == before
