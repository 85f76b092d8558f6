"""Draw the pictures of the site: ``python docs/pictures.py`` writes docs/img.

What a picture of a mask shows comes from the package itself; tests/docs holds the SVG files to it.
``docs/img/dam_stages.png`` needs the embedded model and matplotlib.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor

from dynmask import Lifetimes, Stripes
from dynmask.dam import Dynamic, amplify, match, true_mask
from dynmask.dam.dynamic_keys import Keys
from dynmask.dam.dynamic_select import select
from dynmask.dam.settings import Settings

IMG = Path(__file__).parent / "img"
TOKENS = 32
CELL = 5
SIDE = TOKENS * CELL

STYLE = """<style>
.dm-t{font:600 11px var(--md-text-font-family,sans-serif);fill:var(--dm-text,#1f2328)}
.dm-s{font:9px var(--md-text-font-family,sans-serif);fill:var(--dm-soft,#59636e)}
.dm-k{fill:var(--dm-key,#2f6fd6)}
.dm-m{fill:var(--dm-sum,#a9c5f2)}
.dm-e{fill:var(--dm-empty,#f0f2f5)}
.dm-l{stroke:var(--dm-soft,#59636e);fill:none}
</style>"""


def scores() -> Tensor:
    """Return ``[1, 1, TOKENS]`` scores, the same with every version of torch."""
    numbers = random.Random(3)
    return torch.tensor([[[numbers.random() for _ in range(TOKENS)]]])


def full_panel() -> tuple[Tensor, Tensor, int]:
    """Return what full attention sees: key by key, as summaries, and how many keys in all."""
    return _plain(torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril())


def _plain(seen: Tensor) -> tuple[Tensor, Tensor, int]:
    return seen, torch.zeros_like(seen), int(seen.sum())


def static_panel() -> tuple[Tensor, Tensor, int]:
    """Return the same of a head's columns and offsets."""
    mask = Stripes(
        columns=(torch.tensor([0, 1, 7, 12]),),
        offsets=(torch.tensor([0, 1, 2, 16]),),
        full_heads=torch.tensor([False]),
    )
    return _plain(mask.dense(TOKENS, TOKENS)[0, 0])


def dynamic_panel() -> tuple[Tensor, Tensor, int]:
    """Return the same of a dynamic mask, small: tiles of 4 rows, blocks of 4 keys.

    The queries of some tiles look hard at one block of keys, in the others at nothing much.
    """
    looks = {3: 0, 5: 2, 6: 1, 7: 4}
    settings = Dynamic(tile=4, block=4, near=4, landmarks=2, queries=4, shortest=0)
    q, k = torch.zeros(1, 1, TOKENS, 8), torch.zeros(1, 1, TOKENS, 8)
    for block in range(TOKENS // settings.block):
        k[0, 0, block * settings.block + block % settings.block, block] = 1
    for tile, block in looks.items():
        q[0, 0, tile * settings.tile : (tile + 1) * settings.tile, block] = 8
    keys = Keys.build(k, k, block=settings.block, tile=settings.tile, marks=settings.landmarks)
    choice = select(q, keys, settings, first=0, scale=1.0)
    seen, summary, _ = full_panel()
    for tile in range(TOKENS // settings.tile):
        rows = slice(tile * settings.tile, (tile + 1) * settings.tile)
        for block in range(int(choice.far[tile])):
            if not choice.kept[0, 0, tile, block]:
                columns = slice(block * settings.block, (block + 1) * settings.block)
                seen[rows, columns], summary[rows, columns] = False, True
    return seen, summary, int(choice.shown_pairs(0, TOKENS))


def learned_panel() -> tuple[Tensor, Tensor, int]:
    """Return the same of the 7 best keys so far."""
    return _plain(Lifetimes.top(scores(), keep=7).dense(TOKENS)[0, 0])


PANELS = (
    ("Full attention", "every earlier key", full_panel),
    ("DAM, static", "columns and offsets, calibrated", static_panel),
    ("DAM, dynamic", "blocks by this input; others as one key", dynamic_panel),
    ("DMA, learned", "the w best keys so far", learned_panel),
)


def runs(cells: Tensor, x: float, y: float) -> str:
    """Return path data that covers the True cells, one rectangle a run."""
    parts = []
    for row, line in enumerate(cells.tolist()):
        start = None
        for column, on in enumerate([*line, False]):
            if on and start is None:
                start = column
            elif not on and start is not None:
                width = (column - start) * CELL
                at = f"M{x + start * CELL:g} {y + row * CELL:g}"
                parts.append(f"{at}h{width}v{CELL}h-{width}z")
                start = None
    return "".join(parts)


def masks_svg() -> str:
    """Return the first page's picture: four masks over the same 32 tokens."""
    width, height = 2 * SIDE + 64, 2 * (SIDE + 52) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" data-inline="" viewBox="0 0 {width} {height}" '
        'style="max-width:30rem" role="img" aria-labelledby="dm-masks-title dm-masks-desc">',
        '<title id="dm-masks-title">Which keys a row sees under four kinds of mask</title>',
        '<desc id="dm-masks-desc">Four squares of 32 rows (queries, from top to bottom) and 32 '
        "columns (keys). Full attention fills the triangle below the diagonal. Static stripes are "
        "a few columns and diagonals. A dynamic mask shows each tile of rows some blocks of keys, "
        "and the other blocks in a weaker colour, as one key each. A learned mask shows a few "
        "columns that begin at the diagonal and end where better keys take their place.</desc>",
        STYLE,
    ]
    for number, (title, line, panel) in enumerate(PANELS):
        x = 8 + number % 2 * (SIDE + 48)
        y = 34 + number // 2 * (SIDE + 52)
        seen, summary, pairs = panel()
        share = pairs / (TOKENS * (TOKENS + 1) / 2)
        parts += [
            f'<g data-mask="{title}" data-pairs="{pairs}">',
            f'<text class="dm-t" x="{x}" y="{y - 20}">{title}</text>',
            f'<text class="dm-s" x="{x}" y="{y - 8}">{line}</text>',
            f'<path class="dm-e" d="{runs(torch.ones_like(seen).tril(), x, y)}"/>',
            f'<path class="dm-m" d="{runs(summary, x, y)}"/>' if summary.any() else "",
            f'<path class="dm-k" d="{runs(seen, x, y)}"/>',
            f'<text class="dm-s" x="{x + SIDE - 66}" y="{y + 12}">{100 * share:.0f} % of pairs'
            "</text></g>",
        ]
    return "\n".join(part for part in [*parts, "</svg>"] if part) + "\n"


def tile_svg() -> str:
    """Return the picture of what one tile of rows sees under a dynamic mask."""
    kept, blocks, size, y = {1, 5}, 8, 40, 44
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" data-inline="" viewBox="0 0 440 128" '
        'style="max-width:34rem" role="img" aria-labelledby="dm-tile-title dm-tile-desc">',
        '<title id="dm-tile-title">What one tile of rows sees under a dynamic mask</title>',
        '<desc id="dm-tile-desc">Eight blocks of keys from left to right. Two are seen key by key, '
        "six as one summary each. Then the near keys up to the tile's own, all seen.</desc>",
        STYLE,
    ]
    for block in range(blocks):
        x = 8 + block * size
        if block in kept:
            parts += [
                f'<rect class="dm-k" x="{x + i * 4.75:g}" y="{y}" width="3.75" height="32"/>'
                for i in range(8)
            ]
        else:
            parts.append(f'<rect class="dm-m" x="{x}" y="{y}" width="37" height="32" rx="3"/>')
    start = 8 + blocks * size
    parts += [
        f'<rect class="dm-k" x="{start + i * 4.75:g}" y="{y}" width="3.75" height="32"/>'
        for i in range(22)
    ]
    parts += [
        f'<path class="dm-l" d="M8 {y + 42}v6h{blocks * size - 3}v-6M{start} {y + 42}v6h104v-6"/>',
        f'<text class="dm-s" x="{8 + blocks * size / 2 - 60:g}" y="{y + 62}">far blocks of 64 keys'
        f'</text><text class="dm-s" x="{start + 4}" y="{y + 62}">near: all keys</text>',
        f'<text class="dm-s" x="{start + 4}" y="{y + 74}">up to the row itself</text>',
        f'<text class="dm-t" x="{8 + size}" y="30">key by key</text>',
        f'<text class="dm-s" x="{8 + 2 * size + 28}" y="30">one summary each, of weight 64</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def dam_stages(path: Path, *, layer: int = 1, head: int = 2, length: int = 512) -> None:
    """Draw one head of the embedded model through DAM's first stage, as a PNG."""
    import matplotlib.pyplot as plt

    from dynmask.assets import load_model, load_texts, load_tokenizer

    model, tokenizer = load_model(), load_tokenizer()
    model.set_attn_implementation("eager")
    total = torch.zeros(1, length, length)
    texts = load_texts("calibration")[:6]
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :length]
        with torch.no_grad():
            total += model(ids, output_attentions=True).attentions[layer][0, head]
    settings = Settings(capture_length=length)
    mean = total / len(texts)
    amplified = amplify(mean, total, settings)
    mask = true_mask(amplified, settings.tau)
    found = match(mask, settings.mu, support=settings.support)
    stripes = Stripes(found.columns, found.offsets, torch.tensor([False]))
    shown = stripes.dense(length, length)[0, 0]
    panels = [
        ("mean map", mean[0]),
        ("amplified", amplified[0]),
        ("true mask", mask[0].float()),
        ("columns and offsets", shown.float()),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(5, 5.3), dpi=120, layout="constrained")
    for axis, (title, values) in zip(axes.flat, panels, strict=True):
        # Few pairs hold most of the weight: without a ceiling nothing else could be seen.
        top = max(float(values.flatten().quantile(0.99)), 1e-9)
        axis.imshow(values, cmap="Blues", interpolation="nearest", vmin=0, vmax=top)
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Draw them all."""
    (IMG / "masks.svg").write_text(masks_svg(), encoding="utf-8")
    (IMG / "dynamic_tile.svg").write_text(tile_svg(), encoding="utf-8")
    dam_stages(IMG / "dam_stages.png")


if __name__ == "__main__":
    main()
