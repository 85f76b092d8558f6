"""NSA against the package that the DMA paper compared with, and against a dense definition."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dynmask.baselines.nsa import NativeSparseAttention, NsaBlocks

FIXTURE = Path(__file__).parent / "data" / "nsa.safetensors"
# As in data/make_nsa.py: heads, kv heads, l, d, l', n, window.
PACKAGE = {
    "plain": (2, 2, 8, 8, 8, 2, 7),
    "groups": (4, 2, 4, 4, 8, 2, 6),
    "overlap": (4, 2, 8, 4, 8, 9, 5),
}
DIM = 8


def angles(length, dim=DIM, dtype=torch.float32):
    turns = torch.arange(length)[:, None] * 10000.0 ** -(torch.arange(0, dim, 2).double() / dim)
    turns = torch.cat([turns, turns], -1)[None]
    return turns.cos().to(dtype), turns.sin().to(dtype)


def from_package(name, found):
    """Our layer with the package's weights, whose RoPE pairs channels 2c and 2c + 1."""
    heads, groups, length, stride, select, count, window = PACKAGE[name]
    blocks = NsaBlocks(
        compress_block=length,
        compress_stride=stride,
        select_block=select,
        select_count=count + 1,
        select_initial=0,
        select_local=1,
        window=window + 1,
    )
    weights = {
        key.removeprefix(f"{name}.weights."): value
        for key, value in found.items()
        if key.startswith(f"{name}.weights.")
    }
    width = weights["to_qkv.weight"].shape[1]
    layer = NativeSparseAttention(
        width, heads=heads, groups=groups, dim=DIM, blocks=blocks, compress_hidden=length * DIM // 2
    )
    halves = torch.cat([torch.arange(0, DIM, 2), torch.arange(1, DIM, 2)])
    q, k, v = weights["to_qkv.weight"].split([heads * DIM, groups * DIM, groups * DIM])
    up = weights["k_compress.1.weight"].unflatten(1, (length, DIM))
    layer.load_state_dict(
        {
            "q_proj.weight": q.unflatten(0, (heads, DIM))[:, halves].flatten(0, 1),
            "k_proj.weight": k.unflatten(0, (groups, DIM))[:, halves].flatten(0, 1),
            "v_proj.weight": v,
            "o_proj.weight": weights["combine_heads.weight"],
            "gate.weight": weights["to_strategy_combine.0.weight"],
            "gate.bias": weights["to_strategy_combine.0.bias"],
            "k_compress.memory": weights["compress_mem_kv"][0][..., halves],
            "k_compress.places": weights["k_intrablock_positions"][..., halves],
            "k_compress.up.weight": up[..., halves].flatten(1),
            "k_compress.up.bias": weights["k_compress.1.bias"],
            "k_compress.down.weight": weights["k_compress.3.weight"][halves],
            "k_compress.down.bias": weights["k_compress.3.bias"][halves],
            "v_compress.memory": weights["compress_mem_kv"][1],
            "v_compress.places": weights["v_intrablock_positions"],
            "v_compress.up.weight": weights["v_compress.1.weight"],
            "v_compress.up.bias": weights["v_compress.1.bias"],
            "v_compress.down.weight": weights["v_compress.3.weight"],
            "v_compress.down.bias": weights["v_compress.3.bias"],
        }
    )
    return layer


@pytest.mark.parametrize("name", PACKAGE)
def test_equal_weights_equal_outputs(name):
    found = load_file(FIXTURE)
    layer = from_package(name, found)
    inputs = {key: x for key, x in found.items() if key.startswith(f"{name}.x.")}
    assert inputs
    for key, x in inputs.items():
        expected = found[key.replace(".x.", ".y.")]
        out = layer(x, position_embeddings=angles(x.shape[1]))
        # Outputs reach 18: some float32 steps of that, which differ between processors.
        torch.testing.assert_close(out, expected, atol=5e-5, rtol=0)


BLOCKS = NsaBlocks(
    compress_block=6,
    compress_stride=3,
    select_block=9,
    select_count=4,
    select_initial=1,
    select_local=2,
    window=7,
)


def make(*, seed=0, heads=4, groups=2, blocks=BLOCKS, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    layer = NativeSparseAttention(
        10, heads=heads, groups=groups, dim=DIM, blocks=blocks, compress_hidden=5, **changes
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer.to(dtype)


def hidden(batch, length, dtype=torch.float64):
    draw = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, 10, generator=draw, dtype=torch.float64).to(dtype)


def turned(x, position):
    """RoPE of one vector at one place, pair by pair."""
    out = torch.zeros_like(x)
    half = len(x) // 2
    for c in range(half):
        angle = torch.tensor(position * 10000.0 ** (-2 * c / len(x)), dtype=x.dtype)
        out = out.index_put(
            (torch.tensor([c, c + half]),),
            torch.stack(
                [
                    x[c] * angle.cos() - x[c + half] * angle.sin(),
                    x[c + half] * angle.cos() + x[c] * angle.sin(),
                ]
            ),
        )
    return out


def compressed(part, g, x):
    """The learned vector and the blocks of kv head ``g``, ``x [N, d]``, each with its end."""
    made = [(part.memory[g, 0], 0)]
    for end in range(part.stride, len(x) + 1, part.stride):
        rows = [x[j] if j >= 0 else torch.zeros_like(x[0]) for j in range(end - part.block, end)]
        vector = (torch.stack(rows) + part.places[g]).flatten()
        made.append((part.down(torch.relu(part.up(vector))), end))
    return made


def by_the_paper(layer, x):
    """One text ``[N, width]``, row by row."""
    rule, heads = layer.blocks, layer.q_proj.out_features // DIM
    groups = layer.k_proj.out_features // DIM
    q, k, v = (p(x).unflatten(-1, (-1, DIM)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    gates = torch.sigmoid(layer.gate(x)).unflatten(-1, (heads, 3))
    blocks = -(-len(x) // rule.select_block)
    chosen = []
    out = [[None] * heads for _ in x]
    for g in range(groups):
        c_k = compressed(layer.k_compress, g, k[:, g])
        c_v = compressed(layer.v_compress, g, v[:, g])
        r_k = torch.stack([turned(k[j, g], j) for j in range(len(x))])
        for i in range(len(x)):
            seen = [m for m, (_, end) in enumerate(c_k) if end <= i]
            members = range(g * heads // groups, (g + 1) * heads // groups)
            score = [0.0] * blocks
            coarse = {}
            for h in members:
                logits = torch.stack([c_k[m][0] @ q[i, h] for m in seen]) / DIM**0.5
                p = logits.softmax(0)
                coarse[h] = sum(p[at] * c_v[m][0] for at, m in enumerate(seen))
                for at, m in enumerate(seen[1:], 1):
                    end = c_k[m][1]
                    for stride in range(end - rule.compress_block, end, rule.compress_stride):
                        if stride >= 0:
                            score[stride // rule.select_block] += p[at].item()
            own = i // rule.select_block
            always = {b for b in range(own + 1) if b < rule.select_initial}
            always |= set(range(max(0, own - rule.select_local + 1), own + 1))
            rest = sorted(set(range(own + 1)) - always, key=lambda b: -score[b])
            picked = sorted(always) + rest[: max(0, rule.select_count - len(always))]
            picked = picked[: rule.select_count]
            chosen.append(len(rest) > rule.select_count - len(always))
            fine = [j for j in range(i + 1) if j // rule.select_block in picked]
            near = list(range(max(0, i - rule.window + 1), i + 1))
            for h in members:
                row = turned(q[i, h], i)
                exact = (
                    (r_k[keys] @ row / DIM**0.5).softmax(0) @ v[keys, g] for keys in (fine, near)
                )
                parts = [coarse[h], *exact]
                out[i][h] = sum(gate * part for gate, part in zip(gates[i, h], parts, strict=True))
    assert any(chosen) == (len(x) > rule.select_block * rule.select_count)
    return layer.o_proj(torch.stack([torch.cat(row) for row in out]))


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 3), (3, 1)], ids=["gqa", "mha", "mqa"])
@pytest.mark.parametrize("length", [1, 2, 5, 9, 53])
def test_by_the_paper(heads, groups, length):
    layer, x = make(heads=heads, groups=groups), hidden(2, length)
    out = layer(x, position_embeddings=angles(length, dtype=x.dtype))
    expected = torch.stack([by_the_paper(layer, row) for row in x])
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)


def test_gradients():
    """Selection has none; all others are autograd's of the definition."""
    layer, x = make(), hidden(1, 47).requires_grad_()
    leaves = [x, *layer.parameters()]
    factor = torch.randn(1, 47, 10, dtype=torch.float64)
    out = layer(x, position_embeddings=angles(47, dtype=x.dtype))
    grads = torch.autograd.grad((out * factor).sum(), leaves)
    expected = torch.autograd.grad((by_the_paper(layer, x[0]) * factor[0]).sum(), leaves)
    for ours, theirs in zip(grads, expected, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7)


def test_short_input_reaches_every_weight():
    """Distributed training stops at a parameter without a gradient."""
    layer, x = make(), hidden(1, 2)
    layer(x, position_embeddings=angles(2, dtype=x.dtype)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_parts_of_the_rows_at_once(monkeypatch):
    layer, x = make(), hidden(2, 53)
    whole = layer(x, position_embeddings=angles(53, dtype=x.dtype))
    monkeypatch.setattr("dynmask.baselines.nsa_compress._CELLS", 1000)
    parts = layer(x, position_embeddings=angles(53, dtype=x.dtype))
    torch.testing.assert_close(parts, whole)


def test_ties_do_not_look_at_how_much_follows():
    """Blocks of a text that repeats itself weigh the same: keys of importance have no RoPE."""
    layer = make()
    x = hidden(1, 8).repeat(1, 20, 1)
    with torch.no_grad():
        whole = layer(x, position_embeddings=angles(160, dtype=x.dtype))
        for length in (61, 100, 149):
            near = angles(length, dtype=x.dtype)
            alone = layer(x[:, :length], position_embeddings=near)
            torch.testing.assert_close(alone, whole[:, :length])


def test_the_future_changes_nothing():
    layer, x = make(), hidden(1, 53)
    changed = x.clone()
    changed[:, 31:] += 1
    out, other = (layer(t, position_embeddings=angles(53, dtype=x.dtype)) for t in (x, changed))
    torch.testing.assert_close(out[:, :31], other[:, :31])
    assert not torch.allclose(out[:, 31:], other[:, 31:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compress_stride": 0}, "compress_stride=0 must be at least 1"),
        ({"compress_block": 24}, "compress_block=24 must be a multiple of compress_stride=16"),
        ({"select_block": 8}, "select_block=8 must be a multiple"),
        ({"select_local": 0}, "select_local >= 1"),
        ({"select_initial": -1}, "select_initial >= 0"),
        ({"select_count": 2}, "select_count=2 must be at least 3"),
        ({"window": 0}, "window=0 must be at least 1"),
    ],
)
def test_wrong_lengths(changes, message):
    with pytest.raises(ValueError, match=message):
        NsaBlocks(**changes)
