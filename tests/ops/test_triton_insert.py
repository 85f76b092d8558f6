"""The kernel that puts one token into a bounded cache, against plain torch."""

import pytest
import torch
from kernel_cases import GPU, each_dtype, needs_gpu, place, require_triton
from torch.library import opcheck

from dynmask.masks import Lifetimes
from dynmask.masks.lifetimes import _expiry_of_top
from dynmask.ops import attention
from dynmask.ops.bounded import BoundedKeys
from dynmask.ops.bounded_rules import insert_by_torch

require_triton()

from dynmask.masks.triton.select import expiry_of_top  # noqa: E402
from dynmask.ops.triton import insert as module  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")
STATE = ("k", "v", "score", "order", "expiry")
WILD = (0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e-45, -3.4028234663852886e38)
KINDS = {
    "normal": lambda shape, g: torch.randn(shape, generator=g),
    "ties": lambda shape, g: torch.randint(0, 3, shape, generator=g).float(),
    "constant": lambda shape, g: torch.zeros(shape),
    "rising": lambda shape, g: torch.arange(shape[-1]).float().expand(shape),
    "falling": lambda shape, g: -torch.arange(shape[-1]).float().expand(shape),
    "wild": lambda shape, g: torch.tensor(WILD)[torch.randint(len(WILD), shape, generator=g)],
}


def stream(kind, count, *, batch=2, groups=2, dim=5, dtype=torch.float32, seed=0):
    """Keys, values and scores as projections leave them, heads behind tokens."""
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, batch, count, groups, dim, generator=g).to(dtype).transpose(2, 3)
    return k, v, KINDS[kind]((batch, groups, count), g)


def state(given, keep, threshold=None):
    k = given[0]
    return BoundedKeys(
        keep,
        batch=k.shape[0],
        groups=k.shape[1],
        dim=k.shape[3],
        threshold=threshold,
        dtype=k.dtype,
        device=k.device,
    )


def put(insert, into, given, at, present=None):
    tensors = [getattr(into, name) for name in STATE]
    insert(*tensors, *(t[:, :, at : at + 1] for t in given), present, into.threshold)


def assert_same(one, other):
    for name in STATE:
        a, b = getattr(one, name), getattr(other, name)
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)


def check(given, keep, *, threshold=None, real=None):
    """Let kernel and torch take the same tokens; after each all slots must be the same."""
    given = place(*given)
    mine, theirs = state(given, keep, threshold), state(given, keep, threshold)
    for at in range(given[0].shape[2]):
        present = None if real is None else place(real[:, at])[0]
        put(module.insert, mine, given, at, present)
        put(insert_by_torch, theirs, given, at, present)
        assert_same(mine, theirs)
    assert (mine.order >= 0).any() or threshold is not None


@pytest.mark.parametrize("keep", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_scores(kind, keep):
    check(stream(kind, 100 if GPU else 12, batch=1), keep)


@pytest.mark.parametrize("threshold", [None, 0.3, -torch.inf, torch.inf])
def test_padding_and_threshold(threshold):
    real = torch.rand(2, 16, generator=torch.Generator().manual_seed(1)) < 0.6
    check(stream("wild", 16), 5, threshold=threshold, real=real)


@each_dtype
@pytest.mark.parametrize("dim", [1, 16, 31, 64, 80, 128, 256])
def test_head_sizes(dim, dtype):
    check(stream("normal", 4, groups=1, dim=dim, dtype=dtype), 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_scores_in_half_precision(dtype):
    k, v, score = stream("ties", 12, dtype=dtype)
    check((k, v, score.to(dtype)), 4)


@pytest.mark.parametrize("keep", [63, 64, 65, 111])
@pytest.mark.parametrize("block", [32, 64, 4096])
def test_slots_in_several_blocks(keep, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    given = place(*stream("ties", keep + 7, batch=1))
    mine, theirs = state(given, keep), state(given, keep)
    for each in (mine, theirs):
        each.extend(*(t[:, :, : keep - 2] for t in given))
    for at in range(keep - 2, keep + 7):
        put(module.insert, mine, given, at)
        put(insert_by_torch, theirs, given, at)
        assert_same(mine, theirs)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.mT.contiguous().mT,
        lambda t: t.repeat_interleave(3, 2)[:, :, ::3],
        lambda t: t[:1].expand_as(t),
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    ],
    ids=["columns", "apart", "broadcast", "half"],
)
def test_strides(view):
    k, v, score = stream("normal", 8)
    score = torch.stack([score, score], -1)[..., 0]
    check((view(k), v, score), 4)
    check((k, view(v), score), 4)


def test_operator():
    given = place(*stream("normal", 4))
    into = state(given, 3)
    tensors = [getattr(into, name) for name in STATE]
    new = [t[:, :, :1].contiguous() for t in given]
    real = torch.tensor([True, False], device=given[0].device)
    for present, threshold in ((None, None), (real, 0.1)):
        opcheck(torch.ops.dynmask.bounded_insert.default, (*tensors, *new, present, threshold))


def test_a_step_is_traced_whole():
    given = place(*stream("normal", 5, groups=1))
    traced, eager = state(given, 3), state(given, 3)
    traced._insert = module.insert

    def step(k, v, score):
        traced.insert(k, v, score)
        k, _, _, mask = traced.view()
        return k.sum((2, 3)), mask.expiry.clone()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for at in range(5):
        new = [t[:, :, at : at + 1] for t in given]
        total, expiry = compiled(*new)
        eager.insert(*new)
        assert_same(traced, eager)
        assert torch.equal(expiry, eager.expiry)
        torch.testing.assert_close(total, eager.k.sum((2, 3)))


@pytest.mark.parametrize(("offset", "keep"), [(0, 5), (30, 5), (30, 60), (69, 5)])
def test_selection_with_keys_that_are_not_there(offset, keep):
    """What `extend` asks of the selection: two segments that alternate, by kv head."""
    g = torch.Generator().manual_seed(keep)
    score = KINDS["wild"]((4, 1, 70), g)
    shown = (torch.rand(4, 70, generator=g) < 0.6).int()
    got = expiry_of_top(*place(score), keep, *place(shown), offset).cpu()
    want = _expiry_of_top(score, keep, shown, offset)
    at = torch.arange(70)
    for row in range(offset, 70):
        seen, expected = ((at <= row) & (row < t) & (shown[:, None] > 0) for t in (got, want))
        assert torch.equal(seen, expected)


# The whole class where it runs the kernel.


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [1, 7, 300])
@pytest.mark.parametrize("threshold", [None, 0.0], ids=["all", "threshold"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_chunks_and_tokens_keep_what_the_cpu_keeps(kind, keep, threshold, padded):
    given = stream(kind, 700, dim=16)
    mine, theirs = state(place(*given), keep, threshold), state(given, keep, threshold)
    real = torch.rand(2, 700, generator=torch.Generator().manual_seed(1)) < 0.7
    at = 0
    for size in (400, 1, 1, 1, 50, 1, 246):
        for into in (mine, theirs):
            part = [t[:, :, at : at + size].to(into.k.device) for t in given]
            present = real[:, at : at + size].to(into.k.device) if padded else None
            if size > 1:
                into.extend(*part, present=present)
            else:
                into.insert(*part, None if present is None else present[:, 0])
        at += size
        *got, mask = mine.view(by_arrival=True)
        *want, expected = theirs.view(by_arrival=True)
        assert torch.equal(mask.expiry.cpu(), expected.expiry)
        got = [t.cpu() for t in got]
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("keep", [100, 2048])
def test_decode_attends_as_over_the_whole_cache(keep, dtype):
    k, v, score = place(*stream("normal", 5000, groups=2, dim=64, dtype=dtype))
    q = torch.randn(2, 8, 5000, 64, dtype=dtype, device=k.device)
    into = state((k, v, score), keep)
    into.extend(*(t[:, :, :4990] for t in (k, v, score)))
    for at in range(4990, 5000):
        into.insert(*(t[:, :, at : at + 1] for t in (k, v, score)))
        kept_k, kept_v, bias, mask = into.view()
        row = q[:, :, at : at + 1]
        got = attention(row, kept_k, kept_v, mask, bias=bias, impl="triton")
        seen = [t[:, :, : at + 1] for t in (k, v, score)]
        every = Lifetimes.top(seen[2], keep=keep)
        want = attention(row.float(), *(t.float() for t in seen[:2]), every, bias=seen[2])
        close = (
            {"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 0, "atol": 2e-2}
        )
        torch.testing.assert_close(got.float(), want, **close)


@needs_gpu
def test_a_captured_step_follows_new_tokens():
    torch.use_deterministic_algorithms(False)
    k, v, score = place(*stream("normal", 260, groups=2, dim=64, dtype=torch.bfloat16))
    q = torch.randn(2, 8, 1, 64, dtype=k.dtype, device=k.device)
    into, eager = state((k, v, score), 100), state((k, v, score), 100)
    for each in (into, eager):
        each.extend(*(t[:, :, :50] for t in (k, v, score)))
    new = [t[:, :, 50:51].clone() for t in (k, v, score)]
    real = torch.zeros(2, dtype=torch.bool, device=k.device)

    def step(each):
        each.insert(*new, real)
        kept_k, kept_v, bias, mask = each.view()
        return attention(q, kept_k, kept_v, mask, bias=bias, impl="triton")

    stream_ = torch.cuda.Stream()
    stream_.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream_):
        step(into)  # Compiles; the tokens are padding.
    torch.cuda.current_stream().wait_stream(stream_)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(into)
    real[:] = True
    for at in range(50, 260):
        for held, t in zip(new, (k, v, score), strict=True):
            held.copy_(t[:, :, at : at + 1])
        q.normal_()
        real[1] = at % 3 > 0
        graph.replay()
        assert torch.equal(out, step(eager))
        assert_same(into, eager)


@needs_gpu
def test_offsets_beyond_32_bits():
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB")
    torch.use_deterministic_algorithms(False)  # Filling so much memory takes long.
    into = BoundedKeys(2**15, batch=5, groups=64, dim=256, dtype=torch.float16, device="cuda")
    given = [torch.ones(5, 64, 1, 256, dtype=torch.float16, device="cuda")] * 2
    into.insert(*given, torch.ones(5, 64, 1, device="cuda"))
    assert (into.k[:, :, 0] == 1).all()
    assert (into.v[:, :, 0] == 1).all()
    assert into.k[:, :, 1:].any() == False  # noqa: E712


def test_cpu_states_run_torch_and_gpu_states_the_kernel():
    k, v, score = stream("normal", 1)
    assert state((k, v, score), 2)._insert is insert_by_torch
    if GPU:
        assert state(place(k, v, score), 2)._insert is module.insert
