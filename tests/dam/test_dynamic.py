"""Dynamic masks against their definition, written out pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from dynmask.dam import dynamic as dynamic_module
from dynmask.dam import dynamic_select
from dynmask.dam.dynamic import Dynamic, dynamic_attention
from dynmask.dam.dynamic_keys import Keys
from dynmask.dam.dynamic_select import select
from dynmask.dam.landmarks import landmarks

SMALL = Dynamic(coverage=0.9, tile=16, block=8, near=10, landmarks=3, queries=5, few=6, shortest=0)


def draw(q_len, k_len, *, batch=1, heads=4, groups=2, dim=16, sharp=2.0, seed=0, dtype=None):
    torch.manual_seed(seed)
    dtype = dtype or torch.float64
    q = torch.randn(batch, heads, q_len, dim, dtype=dtype) * sharp
    k, v = (torch.randn(batch, groups, k_len, dim, dtype=dtype) for _ in range(2))
    return q, k, v


def causal(q, k, v):
    q_len, k_len = q.shape[2], k.shape[2]
    seen = torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


def landmarks_by_definition(block, count):
    """Vectors, how many each stands for, and places: the farthest from the mean and those taken."""
    left, taken = list(range(len(block))), []
    for _ in range(count - 1):
        seen = [block.mean(0), *(block[i] for i in taken)]
        away = [min(float((block[i] - key).norm()) for key in seen) for i in left]
        taken.append(left.pop(away.index(max(away))))
    vectors = [block[i] for i in taken] + [block[left].mean(0)]
    return vectors, [1] * (count - 1) + [len(left)], taken


def representatives_by_definition(q, settings, heads, begin, end, tile):
    """Queries that stand for a tile's rows, for how many, and at which position."""
    top = tile * settings.tile
    places = [min(max(i, begin), end - 1) for i in range(top, top + settings.tile)]
    rows = torch.stack([q[h, i - begin] for h in heads for i in places])
    found, counts, taken = landmarks_by_definition(rows, min(settings.queries, len(rows)))
    at = [places[i % settings.tile] for i in taken] + [places[-1]]
    return zip(found, counts, at, strict=True), len(rows)


def chosen_by_definition(q, k, settings, b, g, tile):
    """Far blocks and those kept, for one tile of whole sequences, by loops."""
    q_len, k_len, ratio = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    far = max(0, tile * settings.tile - settings.near) // settings.block
    blocks = k[b, g, : far * settings.block].view(far, settings.block, q.shape[3])
    marks = [landmarks_by_definition(block, settings.landmarks)[:2] for block in blocks]
    cost = [0.0] * far
    heads = range(g * ratio, (g + 1) * ratio)
    rows, every = representatives_by_definition(q[b], settings, heads, k_len - q_len, k_len, tile)
    for row, stands_for, at in rows:
        row = row / math.sqrt(q.shape[3])
        summaries = [float((block.mean(0) @ row).exp()) for block in blocks]
        total = float((k[b, g, far * settings.block : at + 1] @ row).exp().sum())
        few = min(4, settings.landmarks - 1)
        for (vectors, _), block in zip(marks, blocks, strict=True):
            total += sum(float((key @ row).exp()) for key in vectors[:few])
            others = (block.sum(0) - sum(vectors[:few])) / (settings.block - few)
            total += (settings.block - few) * float((others @ row).exp())
        for block in range(far):
            error = sum(
                count * ((float((key @ row).exp()) - summaries[block]) / total) ** 2
                for key, count in zip(*marks[block], strict=True)
            )
            cost[block] += stands_for * error / every
    order = sorted(range(far), key=lambda block: -cost[block])
    allowed = (1 - settings.coverage) ** 2
    few = next(n for n in range(far + 1) if sum(cost[block] for block in order[n:]) <= allowed)
    return far, set(order[:few])


def attention_by_definition(q, k, v, settings):
    """The output and the number of pairs shown, row by row."""
    q_len, k_len, ratio = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    begin = k_len - q_len
    out, pairs = torch.empty_like(q), 0
    for b in range(len(q)):
        for g in range(k.shape[1]):
            for tile in range(begin // settings.tile, -(-k_len // settings.tile)):
                far, kept = chosen_by_definition(q, k, settings, b, g, tile)
                keys, values, weights = [], [], []
                for block in range(far):
                    part = slice(block * settings.block, (block + 1) * settings.block)
                    if block in kept:
                        keys += list(k[b, g, part])
                        values += list(v[b, g, part])
                        weights += [0.0] * settings.block
                    else:
                        keys.append(k[b, g, part].mean(0))
                        values.append(v[b, g, part].mean(0))
                        weights.append(math.log(settings.block))
                first = max(begin, tile * settings.tile)
                for i in range(first, min(k_len, (tile + 1) * settings.tile)):
                    near = slice(far * settings.block, i + 1)
                    every_k = torch.stack([*keys, *k[b, g, near]])
                    every_v = torch.stack([*values, *v[b, g, near]])
                    bias = torch.tensor(weights + [0.0] * (i + 1 - near.start), dtype=q.dtype)
                    for h in range(g * ratio, (g + 1) * ratio):
                        logits = every_k @ q[b, h, i - begin] / math.sqrt(q.shape[3])
                        out[b, h, i - begin] = (logits + bias).softmax(0) @ every_v
                        pairs += len(every_k)
    return out, pairs


@pytest.mark.parametrize(
    ("q_len", "k_len", "changes"),
    [
        (100, 100, {}),
        (65, 65, {"block": 4, "near": 0}),
        (37, 111, {}),
        (63, 90, {"coverage": 0.6}),
        (1, 70, {}),
        (33, 64, {"landmarks": 1}),
        (33, 64, {"landmarks": 8}),
        (50, 64, {"landmarks": 7}),
        (50, 64, {"queries": 1}),
        (50, 64, {"queries": 100}),
    ],
    ids=[
        "square",
        "odd",
        "chunk",
        "coarse",
        "one-row",
        "means",
        "every-key",
        "seven",
        "mean-row",
        "rows",
    ],
)
@pytest.mark.parametrize("impl", ["auto", "reference", "sdpa"])
def test_equals_the_definition(q_len, k_len, changes, impl):
    settings = Dynamic(**{**vars(SMALL), **changes})
    q, k, v = draw(q_len, k_len, batch=2)
    expected, pairs = attention_by_definition(q, k, v, settings)
    out, ran = dynamic_attention(q, k, v, settings, impl=impl)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert int(ran.shown) == pairs
    assert ran.causal == 2 * 4 * sum(range(k_len - q_len + 1, k_len + 1))
    assert int(ran.shown) <= int(ran.computed)
    assert ran.impl == ("cpu" if impl == "auto" else impl)


def test_full_coverage_keeps_blocks_that_cost_nothing():
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 1, 2048, 32, generator=g)
    # Every row looks at one key alone.
    q = 40 * k[:, :, torch.randint(0, 1000, (2048,), generator=g)]
    out, ran = dynamic_attention(q, k, v, Dynamic(coverage=1.0))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert int(ran.shown) == ran.causal


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_dense_kernels_evaluate_every_pair(impl):
    q, k, v = draw(100, 100)
    _, ran = dynamic_attention(q, k, v, SMALL, impl=impl)
    assert int(ran.shown) < int(ran.computed) == ran.causal


def test_some_blocks_are_kept_and_some_are_not():
    q, k, v = draw(100, 100)
    settings = Dynamic(**{**vars(SMALL), "coverage": 0.95})
    _, ran = dynamic_attention(q, k, v, settings)
    keys = Keys.build(k, v, block=SMALL.block, tile=SMALL.tile, marks=SMALL.landmarks)
    choice = select(q, keys, settings, first=0, scale=0.25)
    share = choice.kept.sum() / choice.far.sum() / k.shape[1]
    assert 0.2 < float(share) < 0.98
    assert int(ran.shown) < ran.causal


@pytest.mark.parametrize("heads", [2, 6], ids=["mha", "gqa"])
def test_full_coverage_is_causal_attention(heads):
    q, k, v = draw(75, 130, heads=heads)
    settings = Dynamic(**{**vars(SMALL), "coverage": 1.0})
    out, ran = dynamic_attention(q, k, v, settings)
    torch.testing.assert_close(out, causal(q, k, v), rtol=1e-9, atol=1e-9)
    assert int(ran.shown) == ran.causal


def test_short_inputs_have_nothing_far():
    q, k, v = draw(18, 18)
    out, ran = dynamic_attention(q, k, v, SMALL)
    torch.testing.assert_close(out, causal(q, k, v))
    assert int(ran.shown) == ran.causal


def test_landmarks_are_their_definition():
    k = draw(1, 2 * 3 * 13, batch=2)[1].view(2, 2, 6, 13, 16)
    k[0, 1, 2, 5:] = k[0, 1, 2, 4]  # Equal keys stand once each.
    for count in (1, 2, 5, 13):
        found, places = landmarks(k, count)
        assert found.shape == (2, 2, count, 6, 16)
        assert found.is_contiguous()
        for b, g, n in ((0, 0, 0), (1, 1, 5), (0, 1, 2)):
            expected, counts, taken = landmarks_by_definition(k[b, g, n], count)
            torch.testing.assert_close(found[b, g, :, n], torch.stack(expected))
            if n != 2:
                assert places[b, g, n].tolist() == taken
            weights = torch.tensor(counts, dtype=k.dtype)
            torch.testing.assert_close(weights @ found[b, g, :, n] / 13, k[b, g, n].mean(0))


def test_what_lies_behind_a_tile_does_not_touch_its_choice():
    q, k, v = draw(96, 96, dtype=torch.float32)
    keys = [
        Keys.build(k * c[:, None], v, block=SMALL.block, tile=SMALL.tile, marks=SMALL.landmarks)
        for c in (torch.ones(96), torch.where(torch.arange(96) < 64, 1.0, 1e4))
    ]
    settings = Dynamic(**{**vars(SMALL), "coverage": 0.98})
    one, two = (select(q, x, settings, first=0, scale=0.25).kept[:, :, :4] for x in keys)
    assert one[..., :6].any()
    assert one.equal(two)


def test_flat_maps_need_summaries_only():
    q, k, v = draw(600, 600, sharp=0.02)
    settings = Dynamic(coverage=0.98, tile=32, block=16, near=16, landmarks=8, shortest=0)
    out, ran = dynamic_attention(q, k, v, settings)
    assert int(ran.shown) / ran.causal < 0.2
    exact = causal(q, k, v)
    assert float((out - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("tile", [10, 15], ids=["last", "middle"])
def test_a_needle_is_kept_whoever_asks(tile, monkeypatch):
    # Some rows of one tile look each at one early key of its own; no other row does.
    q, k, v = draw(512, 512, heads=2, groups=1, sharp=0.1)
    places, rows = torch.randperm(250)[:6], tile * 32 + torch.tensor([0, 7, 13, 14, 22, 31])
    k[0, 0] /= 4
    k[0, 0, places] = functional.normalize(torch.randn(6, 16, dtype=k.dtype), dim=-1) * 8
    q[0, :, rows] = k[0, 0, places] * 1.5
    settings = Dynamic(coverage=0.98, tile=32, block=16, near=16, landmarks=4, shortest=0)
    out, ran = dynamic_attention(q, k, v, settings)
    exact = causal(q, k, v)
    assert int(ran.shown) / ran.causal < 0.3
    for row in rows.tolist():
        assert float((out[0, :, row] - exact[0, :, row]).norm() / exact[0, :, row].norm()) < 0.05
    # The test can fail: with summaries alone the keys are lost.
    monkeypatch.setattr(dynamic_select, "keep", lambda cost, *_: torch.zeros_like(cost).bool())
    lost, _ = dynamic_attention(q, k, v, settings)
    row = rows[-1]
    assert float((lost[..., row, :] - exact[..., row, :]).norm() / exact[..., row, :].norm()) > 0.3


def test_parts_change_nothing(monkeypatch):
    q, k, v = draw(200, 200, batch=2)
    whole, ran = dynamic_attention(q, k, v, SMALL)
    monkeypatch.setattr(dynamic_module, "_CPU_CELLS", 1)
    for impl in ("auto", "reference"):
        out, again = dynamic_attention(q, k, v, SMALL, impl=impl)
        torch.testing.assert_close(out, whole)
        assert int(again.shown) == int(ran.shown)


def test_chunks_that_end_with_tiles_equal_the_whole():
    q, k, v = draw(111, 111)
    whole, _ = dynamic_attention(q, k, v, SMALL)
    parts, at = [], 0
    for end in (48, 64, 111):
        out, _ = dynamic_attention(q[:, :, at:end], k[:, :, :end], v[:, :, :end], SMALL)
        parts.append(out)
        at = end
    torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_later_tiles_never_change_earlier_ones():
    q, k, v = draw(128, 128)
    changed = [t.clone() for t in (q, k, v)]
    for t in changed:
        t[:, :, 70:] = torch.randn_like(t[:, :, 70:])
    a, _ = dynamic_attention(q, k, v, SMALL)
    b, _ = dynamic_attention(*changed, SMALL)
    assert torch.equal(a[:, :, :64], b[:, :, :64])
    assert not torch.allclose(a[:, :, 70:], b[:, :, 70:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", ["auto", "sdpa"])
def test_narrow_floats(dtype, impl):
    q, k, v = draw(150, 150, dtype=dtype)
    settings = Dynamic(**{**vars(SMALL), "coverage": 1.0})
    out, _ = dynamic_attention(q, k, v, settings, impl=impl)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(),
        causal(q.double(), k.double(), v.double()),
        rtol=0,
        atol=1e-5 if dtype == torch.float32 else 3e-2,
    )


def test_triton_runs_the_same_choice():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (t.to(device) for t in draw(70, 90, dtype=torch.float32))
    settings = Dynamic(**{**vars(SMALL), "coverage": 0.6})
    expected, ran = dynamic_attention(q, k, v, settings, impl="reference")
    out, again = dynamic_attention(q, k, v, settings, impl="triton")
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
    assert int(again.shown) == int(ran.shown)


def test_gradients_flow_through_the_shown_pairs():
    q, k, v = (t.requires_grad_() for t in draw(40, 40))
    out, ran = dynamic_attention(q, k, v, SMALL)
    out.sum().backward()
    assert ran.impl == "sdpa"
    assert all(t.grad is not None and bool(t.grad.isfinite().all()) for t in (q, k, v))
    with pytest.raises(ValueError, match="no_grad"):
        dynamic_attention(q, k, v, SMALL, impl="cpu")


def test_the_clock_runs_around_the_choice():
    class Count:
        entered = inside = 0

        def __enter__(self):
            self.entered += 1
            self.inside += 1

        def __exit__(self, *error):
            self.inside -= 1

    clock = Count()
    dynamic_attention(*draw(100, 100), SMALL, clock=clock)
    assert clock.entered >= 2
    assert clock.inside == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"coverage": 0},
        {"coverage": 1.5},
        {"coverage": "0.9"},
        {"block": 2.5},
        {"landmarks": 65},
        {"tile": 0},
        {"block": 0},
        {"landmarks": 0},
        {"queries": 0},
        {"near": -1},
        {"few": -1},
        {"shortest": -1},
    ],
    ids=str,
)
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Dynamic(**wrong)


@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 4, 9, 8), (1, 3, 9, 8)),
        ((1, 4, 9, 8), (1, 2, 8, 8)),
        ((1, 4, 0, 8), (1, 2, 8, 8)),
        ((4, 9, 8), (2, 9, 8)),
        ((1, 4, 9, 16), (1, 2, 9, 8)),
        ((0, 4, 9, 8), (0, 2, 9, 8)),
    ],
    ids=["heads", "more-rows-than-keys", "no-rows", "no-batch", "dims", "empty-batch"],
)
def test_shapes_that_do_not_fit(shapes):
    q, k = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"heads must|keys:|no rows|must be \[batch|must agree"):
        dynamic_attention(q, k, k, SMALL)


def test_dtypes_that_do_not_fit():
    q, k, v = draw(40, 40)
    with pytest.raises(ValueError, match=r"v is torch\.float32"):
        dynamic_attention(q, k, v.float(), SMALL)
