"""Plan folders that somebody else made up. `tests/dam/test_store.py` has the plainer ones."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct

import pytest
from dying import child, out_of_memory_at
from plan_files import forge, forge_tensors, tensors_file

from dynmask.dam import MaskPlan, check_writable

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def folder(plan, tmp_path):
    plan.save(tmp_path / "plan")
    return tmp_path / "plan"


def refused(folder, message=""):
    """Loading says what is wrong and where, in a process that gets 400 MiB more than it has."""

    def load():
        out_of_memory_at(400 * 2**20)
        with pytest.raises(ValueError, match=message) as caught:
            MaskPlan.load(folder)
        assert str(folder) in str(caught.value)

    assert child(load) == 0


def header(tensors, body=b""):
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + body


def one(dtype, shape, size, *, name="0.corner"):
    return header({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}, bytes(size))


ENTRY = b'"0.corner":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
SAFETENSORS = {
    "no rows of 2^63": one("U8", [0, 2**63], 0),
    "no rows of 2^62 x 4": one("U8", [0, 2**62, 4], 0),
    "2^31 x 2^31": one("U8", [2**31, 2**31], 8),
    "negative size": one("U8", [-1], 1),
    "64 dimensions": one("U8", [1] * 64, 1),
    "65 dimensions": one("U8", [1] * 65, 1),
    "no dimension": one("U8", [], 1),
    "float8": one("F8_E4M3", [1], 1),
    "float4": one("F4", [2], 1),
    "uint64": one("U64", [1], 8),
    "complex": one("C64", [1], 8),
    "bool of 0": one("BOOL", [4], 4),
    "unknown type": one("PICKLE", [4], 4),
    "name twice, bytes apart": header(
        b"{" + ENTRY % (0, 1) + b"," + ENTRY % (1, 2) + b"}", bytes(2)
    ),
    "name twice, same bytes": header(b"{" + ENTRY % (0, 1) + b"," + ENTRY % (0, 1) + b"}", b"x"),
    "shared bytes": header(b"{" + ENTRY % (0, 1) + b',"b":' + ENTRY[11:] % (0, 1) + b"}", b"x"),
    "hole between": header(b"{" + ENTRY % (3, 4) + b"}", bytes(4)),
    "reversed": header(b"{" + ENTRY % (1, 0) + b"}", b"x"),
    "bytes behind": header(b"{" + ENTRY % (0, 1) + b"}", bytes(9)),
    "metadata of numbers": header({"__metadata__": {"a": 1}}),
    "deep metadata": header(b'{"__metadata__":' + b"[" * 5000 + b"}"),
    "latin-1": header(b'{"\xe9":1}'),
    "surrogate": header(b'{"\\ud800":' + ENTRY[11:] % (0, 1) + b"}", b"x"),
    "path as a name": one("U8", [1], 1, name="../../etc/passwd"),
    "list": header(b"[]"),
    "empty": header({}),
}


@FORKS
@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS)
def test_safetensors_that_fit_no_plan(folder, content):
    forge_tensors(folder, content)
    refused(folder)


NAMES = [
    "/etc/passwd",
    "..",
    "../tensors-0123456789abcdef.safetensors",
    "tensors-0123456789abcdef.safetensors/../x",
    "tensors-0123456789abcdef.safetensors\n",
    "tensors-0123456789abcdef.safetensors\0",
    "tensors-0123456789ABCDEF.safetensors",
    "C:\\tensors-0123456789abcdef.safetensors",
    "tensors-０１２３４５６７８９abcdef.safetensors",
    ["tensors-0123456789abcdef.safetensors"],
    None,
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_no_other_file_can_be_named(folder, name):
    forge(folder, lambda body: body["tensors"].update(file=name))
    with pytest.raises(ValueError, match="file has the wrong type or range"):
        MaskPlan.load(folder)


def nested(depth):
    return '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize("depth", [17, 500, 900, 5000, 200_000])
def test_deep_nesting_is_refused(folder, depth):
    """Below and above what json itself can follow; the hash is not reached."""
    body = json.loads((folder / "plan.json").read_text())
    body["fingerprint"] = "HERE"
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).replace('"HERE"', nested(depth))
    # The hash of this very text, without its own field.
    rest = text.replace(f',"sha256":"{body["sha256"]}"', "", 1)
    assert rest != text
    text = text.replace(body["sha256"], hashlib.sha256(rest.encode()).hexdigest())
    (folder / "plan.json").write_text(text)
    with pytest.raises(ValueError, match="nested"):
        MaskPlan.load(folder)


def test_nesting_of_a_real_fingerprint_is_no_trouble(folder):
    forge(folder, lambda body: body["fingerprint"].update(rope=json.loads(nested(14))))
    MaskPlan.load(folder)


@FORKS
@pytest.mark.parametrize("which", ["json", "tensors"])
@pytest.mark.parametrize("kind", ["zeros", "pipe", "folder", "loop"])
def test_what_is_no_file_is_not_read(folder, which, kind):
    """A device without end, a pipe without a writer: neither fills the memory nor waits."""
    path = folder / "plan.json" if which == "json" else tensors_file(folder)
    if which == "tensors":
        # A device's size is 0, and so may be what the json says.
        forge(folder, lambda body: body["tensors"].update(bytes=0))
    path.unlink()
    if kind == "zeros":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    refused(folder, message="device or a pipe|cannot be read")


def test_links_are_followed_as_in_the_cache_of_the_hub(plan, folder, tmp_path):
    """A snapshot's files are links to blobs; saving replaces the links, never what they name."""
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert MaskPlan.load(snapshot).settings == plan.settings
    plan.with_coverage(1.0).save(snapshot)
    assert MaskPlan.load(snapshot).settings.coverage == 1.0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("kind", ["dangling", "file", "loop"])
def test_a_link_that_is_no_folder_is_not_written_through(plan, tmp_path, kind):
    target, link = tmp_path / "elsewhere", tmp_path / "plan"
    if kind == "file":
        target.write_text("mine")
    link.symlink_to(link if kind == "loop" else target)
    with pytest.raises(ValueError, match="cannot write a plan"):
        plan.save(link)
    assert target.read_text() == "mine" if kind == "file" else not target.exists()


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "\ud800"], ids=["long", "nul", "surrogate"])
def test_names_that_no_folder_can_have(plan, tmp_path, name):
    """Said before the work, not after it."""
    with pytest.raises(ValueError, match="cannot write a plan to"):
        check_writable(tmp_path / name)
    with pytest.raises(ValueError, match=r"plan\.json: "):
        MaskPlan.load(tmp_path / name)


def test_a_folder_in_the_tensors_place_is_no_obstacle(plan, folder):
    (folder / "tensors-0123456789abcdef.safetensors").mkdir()
    plan.with_coverage(1.0).save(folder)
    assert MaskPlan.load(folder).settings.coverage == 1.0
    assert len(list(folder.iterdir())) == 2


def swapped_tensors(folder, other):
    """The other plan's tensors under this one's name."""
    shutil.copy(tensors_file(other), tensors_file(folder))


def swapped_json(folder, other):
    shutil.copy(other / "plan.json", folder / "plan.json")


@pytest.mark.parametrize("swap", [swapped_tensors, swapped_json])
def test_parts_of_two_plans_are_not_mixed(plan, folder, tmp_path, swap):
    last = max(plan.layers)
    other = MaskPlan(
        fingerprint=plan.fingerprint,
        settings=plan.settings,
        data=plan.data,
        layers={last: plan.layers[last]},
    )
    other.save(tmp_path / "other")
    swap(folder, tmp_path / "other")
    with pytest.raises(ValueError, match=r"were written|does not match|No such file"):
        MaskPlan.load(folder)


@FORKS
def test_sizes_are_checked_before_anything_is_allocated(folder):
    """200,000 heads of 65,536 tokens, 50 TB: declared in 6 MB of json and backed by nothing."""

    def change(body):
        body["settings"]["capture_length"] = 65536
        heads = 200_000
        record = body["layers"][0]
        record |= dict.fromkeys(("coverage", "tail_coverage", "corner_coverage"), [0.5] * heads)
        record["gate"] = [True] * heads
        body["layers"] = [record]

    forge(folder, change)
    refused(folder, message="must be")
