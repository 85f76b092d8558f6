import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmask.dam import LayerPlan, MaskPlan, Settings, describe_data, preview
from dynmask.dam.codec import decode_layer, encode_layer


def same(one, other):
    """Equality of two layers or plans, tensor by tensor."""
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype, field.name
            assert torch.equal(a, b), field.name
        elif isinstance(a, tuple):
            assert [x.tolist() for x in a] == [x.tolist() for x in b], field.name
        elif field.name == "layers":
            assert list(a) == list(b)
            for index in a:
                same(a[index], b[index])
        else:
            assert a == b, field.name


def test_round_trip(plan, tmp_path):
    plan.save(tmp_path / "deep" / "plan")
    loaded = MaskPlan.load(tmp_path / "deep" / "plan")
    same(plan, loaded)
    for mode in ("static", "auto", "dense"):
        assert torch.equal(plan.density(100, mode), loaded.density(100, mode))


def test_a_saved_plan_is_json_and_safetensors_only(plan, tmp_path):
    plan.save(tmp_path / "plan")
    names = sorted(entry.name for entry in (tmp_path / "plan").iterdir())
    assert names[0] == "plan.json"
    assert names[1].startswith("tensors-")
    assert names[1].endswith(".safetensors")
    assert len(names) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan"]


@settings(deadline=None, max_examples=30)
@given(
    heads=st.integers(1, 3),
    length=st.sampled_from([2, 3, 7, 8, 9, 130]),
    density=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_encode_and_decode_any_layer(heads, length, density, seed):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    def positions():
        return (rand(length) < density).nonzero().flatten()

    corner = (rand(heads, length, length) < density).tril() | torch.eye(length, dtype=torch.bool)
    layer = LayerPlan(
        columns=tuple(positions() for _ in range(heads)),
        offsets=tuple(torch.cat([torch.tensor([0]), positions()]).unique() for _ in range(heads)),
        corner=corner,
        coverage=rand(heads),
        tail_coverage=rand(heads),
        corner_coverage=rand(heads),
        gate=rand(heads) < 0.5,
        previews=preview(rand(heads, length, length), 1e6 * rand(heads, length, length)),
    )
    record, tensors = encode_layer(5, layer)
    record = json.loads(json.dumps(record))
    same(layer, decode_layer(record, tensors, length=length))
    assert tensors == {}


def test_layers_may_share_tensors_and_lack_columns(plan, tmp_path):
    none = torch.tensor([], dtype=torch.int64)
    layer = dataclasses.replace(plan.layers[0], columns=(none, none))
    shared = dataclasses.replace(plan, layers={0: layer, 1: layer})
    shared.save(tmp_path / "plan")
    same(shared, MaskPlan.load(tmp_path / "plan"))


def test_layers_are_sorted_and_the_fingerprint_is_plain(plan):
    shuffled = dataclasses.replace(
        plan, layers=dict(reversed(plan.layers.items())), fingerprint={"shape": (1, 2)}
    )
    assert list(shuffled.layers) == sorted(plan.layers)
    assert shuffled.fingerprint == {"shape": [1, 2]}


def test_modes(plan):
    index = 2
    layer = plan.layers[index]
    assert layer.gate.tolist() == [True, False]
    static, auto, dense = (plan.stripes(index, mode) for mode in ("static", "auto", "dense"))
    size = layer.capture_length + 9
    assert static.full_heads.tolist() == [False, False]
    assert torch.equal(auto.dense(size)[0, 1], static.dense(size)[0, 1])
    assert torch.equal(auto.dense(size)[0, 0], dense.dense(size)[0, 0])
    assert torch.equal(dense.dense(size)[0, 1], torch.ones(size, size).tril() > 0)
    assert torch.equal(static.corner, layer.corner)
    assert dense.corner is None


@pytest.mark.parametrize(
    ("layer", "mode", "message"),
    [
        pytest.param(1, "static", r"layer=1 .* holds \[0, 2\]", id="layer"),
        pytest.param(0, "dynamic", "mode='dynamic'", id="mode"),
    ],
)
def test_stripes_name_what_is_wrong(plan, layer, mode, message):
    with pytest.raises(ValueError, match=message):
        plan.stripes(layer, mode)


@pytest.mark.parametrize("length", [5, 16, 33, 100])
def test_density_counts_pairs(plan, length):
    for mode in ("static", "auto", "dense"):
        want = [
            plan.stripes(layer, mode).dense(length)[0].sum((-2, -1)) / (length * (length + 1) / 2)
            for layer in plan.layers
        ]
        torch.testing.assert_close(plan.density(length, mode).float(), torch.stack(want))


@pytest.mark.parametrize("target", [0.2, 0.9, 1.0])
def test_with_coverage_gates_again(plan, target):
    gated = plan.with_coverage(target)
    assert gated.settings == dataclasses.replace(plan.settings, coverage=target)
    for index, layer in gated.layers.items():
        assert layer.gate.tolist() == [share < target for share in layer.coverage.tolist()]
        assert layer.corner is plan.layers[index].corner
    assert plan.settings.coverage == 0.5
    with pytest.raises(ValueError, match="coverage="):
        plan.with_coverage(0.0)


def test_inspect_is_json_and_adds_up(plan):
    summary = json.loads(json.dumps(plan.inspect(), allow_nan=False))
    assert summary["heads"] == 4
    assert summary["gated_heads"] == sum(layer["gated_heads"] for layer in summary["layers"]) == 2
    assert [layer["layer"] for layer in summary["layers"]] == [0, 2]
    for length in (4096, 16384, 65536):
        for mode in ("static", "auto"):
            want = plan.density(length, mode)
            assert summary["density"][mode][str(length)] == pytest.approx(want.mean().item())
            got = [layer["density"][mode][str(length)] for layer in summary["layers"]]
            assert got == pytest.approx(want.mean(1).tolist())
    first = summary["layers"][0]
    assert first["columns"] == [len(item) for item in plan.layers[0].columns]
    assert first["offsets"] == [len(item) for item in plan.layers[0].offsets]
    assert first["coverage"] == plan.layers[0].coverage.tolist()


def test_previews_keep_a_line_of_one_token():
    mean = torch.zeros(2, 1000, 1000)
    mean[1, :, 501] = 0.5
    pooled = preview(mean, mean * 1e6)
    assert pooled.shape == (2, 2, 128, 128)
    assert (pooled[0, 1, :, 501 * 128 // 1000] == 0.5).all()
    assert pooled.isfinite().all()
    assert pooled[1].max() == torch.finfo(torch.float16).max


def test_describe_data_tells_texts_apart():
    data = describe_data([[1, 2, 3], [4]], holdout=1)
    assert (data["texts"], data["tokens"], data["holdout"]) == (2, 4, 1)
    assert data["holdout_length"] == 1
    assert describe_data([[1], [2, 3], [4]], holdout=2)["holdout_length"] == 2
    assert describe_data([[1]], holdout=0)["holdout_length"] == 0
    assert (
        data["sha256"]
        == describe_data([torch.tensor([1, 2, 3]).tolist(), [4]], holdout=1)["sha256"]
    )
    others = [[[1, 2], [3, 4]], [[1, 2, 3, 4]], [[1, 2, 3], [5]], [[4], [1, 2, 3]]]
    hashes = {describe_data(other, holdout=1)["sha256"] for other in others}
    assert len(hashes | {data["sha256"]}) == 5


LAYER_FAULTS = {
    "columns-unsorted": ({"columns": (torch.tensor([3, 1]),) * 2}, r"columns\[0\] must be sorted"),
    "columns-twice": ({"columns": (torch.tensor([1, 1]),) * 2}, r"columns\[0\] must be sorted"),
    "columns-outside": ({"columns": (torch.tensor([16]),) * 2}, r"columns\[0\] must lie in"),
    "columns-negative": ({"columns": (torch.tensor([-1, 2]),) * 2}, r"columns\[0\] must lie in"),
    "columns-int32": ({"columns": (torch.tensor([1], dtype=torch.int32),) * 2}, "int64"),
    "no-heads": ({"columns": (), "offsets": ()}, "0 heads"),
    "offsets-heads": ({"offsets": (torch.tensor([0]),)}, "2 heads, offsets 1"),
    "offsets-own-token": ({"offsets": (torch.tensor([1]),) * 2}, "own token"),
    "offsets-empty": ({"offsets": (torch.tensor([], dtype=torch.int64),) * 2}, "own token"),
    "corner-future": ({"corner": torch.ones(2, 16, 16, dtype=torch.bool)}, "causal"),
    "corner-own-token": ({"corner": torch.zeros(2, 16, 16, dtype=torch.bool)}, "own token"),
    "corner-heads": ({"corner": torch.zeros(1, 16, 16, dtype=torch.bool)}, "corner must be"),
    "coverage-range": ({"coverage": torch.tensor([0.5, 1.5])}, "coverage must be from 0 to 1"),
    "coverage-nan": ({"tail_coverage": torch.tensor([0.5, torch.nan])}, "tail_coverage"),
    "coverage-dtype": ({"corner_coverage": torch.ones(2).double()}, "corner_coverage must be"),
    "gate": ({"gate": torch.ones(2)}, "gate must be"),
    "previews-shape": ({"previews": torch.zeros(2, 2, 8, 8).half()}, "previews must be"),
    "previews-nan": ({"previews": torch.full((2, 2, 16, 16), torch.nan).half()}, "finite"),
}


@pytest.mark.parametrize(("change", "message"), LAYER_FAULTS.values(), ids=LAYER_FAULTS)
def test_a_layer_names_its_fault(plan, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(plan.layers[0], **change)


PLAN_FAULTS = {
    "fingerprint-nan": ({"fingerprint": {"x": float("nan")}}, "fingerprint"),
    "fingerprint-object": ({"fingerprint": {"x": object()}}, "fingerprint"),
    "data-missing": ({"data": {}}, "data: missing"),
    "data-unknown": ({"data": describe_data([[1]], holdout=0) | {"x": 1}}, r"unknown \['x'\]"),
    "data-length": (
        {"data": describe_data([[1]], holdout=0) | {"holdout_length": 1.5}},
        "holdout_le",
    ),
    "data-hash": ({"data": describe_data([[1]], holdout=0) | {"sha256": "0"}}, "sha256"),
    "no-layers": ({"layers": {}}, "at least one layer"),
    "capture-length": ({"settings": Settings(capture_length=32)}, "capture length"),
}


@pytest.mark.parametrize(("change", "message"), PLAN_FAULTS.values(), ids=PLAN_FAULTS)
def test_a_plan_names_its_fault(plan, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(plan, **change)


def test_a_layer_index_must_be_a_number(plan):
    with pytest.raises(ValueError, match="'0' is no layer index"):
        dataclasses.replace(plan, layers={"0": plan.layers[0]})
