"""What the scores of a trained DMA model pick: positions, types of tokens, how long keys live.

    python benchmarks/trained/picks.py --model run/model --out picks
    python benchmarks/trained/picks.py --model run/model --texts book.txt --length 4096 --out picks

Reads windows of text at the model's own ``keep``, at half and at double of it, and writes
``picks.json`` and pictures. All figures follow from one number a key and kv head, the row that
evicts it, and count the rows that had a choice: those with more than ``keep`` keys before them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from kinds import Kinds, kinds_of_text
from torch import Tensor

from dynmask.dma.selection import keep_of, select

Row = dict[str, Any]
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@contextmanager
def recorded(model: Any) -> Iterator[list[Tensor]]:
    """Collect each layer's scores ``[B, G, N]`` of a forward pass, in order of the layers."""
    found: list[Tensor] = []
    handles = [
        layer.self_attn.score.register_forward_hook(
            lambda module, given, score: found.append(score.detach())
        )
        for layer in model.model.layers
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def expiries(model: Any, ids: Sequence[int]) -> Tensor:
    """The row that evicts each key, ``[layers, G, N]`` int64, at most N; it is j if never admitted.

    Args:
        model: a DMA model; its configuration says how many keys a row keeps.
        ids: the tokens of one window.
    """
    with recorded(model) as scores:
        model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    masks = []
    for index, score in enumerate(scores):
        keep = keep_of(model.config.keep, index, len(ids))
        mask = select(
            score, keep=keep, window=model.config.window, threshold=model.config.threshold
        )
        masks.append(mask.expiry[0].long().clamp_max(len(ids)).cpu())
    return torch.stack(masks)


def rows_seen(expiry: Tensor, first: int, *, since: Tensor | int = 0, until: Any = None) -> Tensor:
    """How many rows from ``first`` on see each key, of those at certain distances from it.

    Args:
        expiry: ``[..., N]``.
        first: the first row that counts.
        since: the least distance from the key that counts.
        until: the distance from which on none counts; None for no limit.

    Returns:
        ``[..., N]`` int64.
    """
    key = torch.arange(expiry.shape[-1])
    start = (key + since).clamp_min(first)
    stop = expiry if until is None else torch.minimum(expiry, key + until)
    return (stop - start).clamp_min(0)


def places(expiry: Tensor, rows: int, *, first: int, last: int) -> Row:
    """Shares of the kept pairs by position, ``[layers, G]`` each, and of all causal pairs.

    Args:
        expiry: ``[layers, G, N]``.
        rows: rows without a choice, which do not count.
        first: how many tokens of the text are its first.
        last: how many keys, the own one included, are the last of a row.
    """
    length = expiry.shape[-1]

    def counts(expiry: Tensor) -> dict[str, Tensor]:
        near = rows_seen(expiry, rows, until=last)
        far = rows_seen(expiry, rows, since=last)
        return {
            # A first token is not among the last of a row that has a choice, or hardly ever.
            "first": far[..., :first].sum(-1),
            "last": near.sum(-1),
            "rest": far[..., first:].sum(-1),
        }

    return _against(counts(expiry), counts(torch.full((length,), length)))


def types(expiry: Tensor, rows: int, kinds: Kinds) -> Row:
    """Shares of the kept pairs by the type of the key's token, and of all causal pairs.

    Args:
        expiry: ``[layers, G, N]``.
        rows: rows without a choice.
        kinds: the names of the types, and which one each token has.
    """
    length = expiry.shape[-1]

    def counts(expiry: Tensor) -> dict[str, Tensor]:
        seen = rows_seen(expiry, rows)
        return {
            name: seen[..., kinds.of == index].sum(-1) for index, name in enumerate(kinds.names)
        }

    return _against(counts(expiry), counts(torch.full((length,), length)))


def _against(kept: dict[str, Tensor], causal: dict[str, Tensor]) -> Row:
    """Pairs by name as counts, so that windows can be added up."""
    return {name: (kept[name], causal[name]) for name in kept}


def lives(expiry: Tensor) -> Row:
    """How long keys live, by layer and head.

    Args:
        expiry: ``[layers, G, N]``.

    Returns:
        ``admitted`` ``[layers, G]``, keys that some row sees; ``alive``, those that the last row
        still sees; ``keys``; and ``lives`` ``[layers, G, N]``, the rows that see each key, of
        which those of keys alive at the end are cut off there.
    """
    length = expiry.shape[-1]
    key = torch.arange(length)
    return {
        "keys": torch.full(expiry.shape[:-1], length),
        "admitted": (expiry > key).sum(-1),
        "alive": (expiry >= length).sum(-1),
        "lives": (expiry - key).clamp_min(0),
    }


def overlap(expiry: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Kept pairs that two kv heads of a layer share, mean over pairs of heads, and those of one.

    Keys that both keep live until the earlier of the two expiries.

    Args:
        expiry: ``[layers, G, N]``, G at least 2.
        rows: rows without a choice.

    Returns:
        ``[layers]`` each: shared pairs, kept pairs.
    """
    heads = expiry.shape[1]
    both = [
        rows_seen(torch.minimum(expiry[:, a], expiry[:, b]), rows).sum(-1)
        for a in range(heads)
        for b in range(a + 1, heads)
    ]
    return torch.stack(both).double().mean(0), rows_seen(expiry, rows).sum(-1).double().mean(1)


def contained(less: Tensor, more: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Pairs kept by ``less`` that ``more`` keeps too, and all that ``less`` keeps, ``[layers]``."""
    both = rows_seen(torch.minimum(less, more), rows).sum((-1, -2))
    return both, rows_seen(less, rows).sum((-1, -2))


def by_chance(length: int, keep: int) -> float:
    """Share that two sets of ``keep`` keys have in common if drawn at random, mean of the rows."""
    rows = range(keep, length)
    return sum(keep / (row + 1) for row in rows) / len(rows)


def statistics(
    model: Any, windows: Sequence[tuple[Sequence[int], Kinds]], *, first: int, last: int
) -> Row:
    """All figures of a model at its ``keep``, the windows added up.

    Args:
        model: a DMA model whose ``keep`` is one integer, less than the windows' length.
        windows: tokens with their types, all of one length.
        first: how many tokens are the first of a text.
        last: how many keys are the last of a row.
    """
    keep, length = model.config.keep, len(windows[0][0])
    found = [expiries(model, ids) for ids, _ in windows]
    names = windows[0][1].names
    life = [lives(expiry) for expiry in found]
    made: Row = {
        "keep": keep,
        "length": length,
        "windows": len(windows),
        "first": first,
        "last": last,
        "places": _shares([places(e, keep, first=first, last=last) for e in found]),
        "types": _shares(
            [types(e, keep, kinds) for e, (_, kinds) in zip(found, windows, strict=True)]
        ),
        "type_names": list(names),
        "lives": _quantiles(life),
        "admitted": _ratio(life, "admitted", "keys"),
        "alive": _ratio(life, "alive", "keys"),
        "by_chance": round(by_chance(length, keep), 5),
    }
    if found[0].shape[1] > 1:
        shared = [overlap(expiry, keep) for expiry in found]
        made["overlap"] = _rounded(sum(a for a, _ in shared) / sum(b for _, b in shared))
    return made


def when_keep_changes(
    model: Any, windows: Sequence[tuple[Sequence[int], Kinds]], *, first: int, last: int
) -> list[Row]:
    """The figures at half, at the model's own and at double ``keep``, which ends as it was.

    ``kept_by_own`` is the share of the pairs that are kept at the model's own ``keep`` too, in rows
    that have a choice at both, by layer: all of them in the first layer for half, since its scores
    read the tokens alone. For double it is the share of the own's pairs that are kept.
    """
    own = model.config.keep
    made = []
    trained = [expiries(model, ids) for ids, _ in windows]
    try:
        for keep in (own // 2, own, 2 * own):
            model.config.keep = keep
            row = statistics(model, windows, first=first, last=last)
            rows = max(own, keep)
            pairs = []
            for before, (ids, _) in zip(trained, windows, strict=True):
                now = expiries(model, ids)
                pairs.append(
                    contained(now, before, rows) if keep <= own else contained(before, now, rows)
                )
            row["kept_by_own"] = _rounded(sum(a for a, _ in pairs) / sum(b for _, b in pairs))
            made.append(row)
    finally:
        model.config.keep = own
    return made


def _shares(counts: Sequence[Row]) -> Row:
    """By name the share of the kept pairs, ``[layers, G]``, and of the causal ones."""
    names = counts[0]
    kept = {name: sum(c[name][0] for c in counts) for name in names}
    causal = {name: sum(int(c[name][1].sum()) for c in counts) for name in names}
    all_kept, all_causal = sum(kept.values()), sum(causal.values())
    return {
        name: {
            "kept": _rounded(kept[name].double() / all_kept),
            "causal": round(causal[name] / all_causal, 5),
        }
        for name in names
    }


def _quantiles(found: Sequence[Row]) -> list[Any]:
    """Rows that see a key, over the keys that were admitted: ``[layers][G][quantiles]``."""
    whole = torch.cat([row["lives"] for row in found], -1).double()
    points = torch.tensor(QUANTILES, dtype=torch.double)
    return [
        [_rounded(head[head > 0].quantile(points), 1) if (head > 0).any() else None for head in at]
        for at in whole
    ]


def _ratio(found: Sequence[Row], part: str, whole: str) -> Any:
    return _rounded(sum(r[part] for r in found).double() / sum(r[whole] for r in found))


def _rounded(values: Tensor, digits: int = 4) -> Any:
    return torch.round(values.double(), decimals=digits).tolist()


def windows_of_text(tokenizer: Any, texts: Sequence[str], *, length: int, windows: int) -> Any:
    """The first windows of the texts in turn, as perplexity takes them, with types of tokens."""
    from dynmask.eval.perplexity import make_windows

    cut = make_windows(tokenizer, texts, length=length, windows=windows)
    return [(window.ids, kinds_of_text(tokenizer, window.ids)) for window in cut]


def main() -> None:
    from picks_draw import draw
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import dynmask.dma  # noqa: F401  (makes the type known)
    from dynmask.assets import load_texts
    from dynmask.cli.inputs import read_texts

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a DMA model with a tokenizer")
    parser.add_argument("--texts", nargs="+", help="default: texts of the package")
    parser.add_argument("--length", type=int, help="of a window; default 4 times keep")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--first", type=int, default=4, help="tokens that are the first of a text")
    parser.add_argument("--last", type=int, default=64, help="keys that are the last of a row")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    if model.config.model_type != "dma":
        parser.error(f"{args.model} holds a {model.config.model_type} model, not a DMA one")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    keep = model.config.keep
    length = args.length or 4 * keep if isinstance(keep, int) else 0
    if not isinstance(keep, int) or not 2 <= keep < length / 2:
        parser.error(f"keep={keep} must be one integer, and less than half of the window")
    if model.config.window > keep // 2:
        parser.error(f"window={model.config.window}: at half of keep={keep} no key would be chosen")
    texts = read_texts(args.texts) if args.texts else load_texts("perplexity")
    try:
        windows = windows_of_text(tokenizer, texts, length=length, windows=args.windows)
    except ValueError as error:
        parser.error(str(error))
    found = when_keep_changes(model, windows, first=args.first, last=args.last)
    shown = expiries(model, windows[0][0])
    args.out.mkdir(parents=True, exist_ok=True)
    made = {"model": args.model.name, "picks": found, "expiry": shown.tolist()}
    (args.out / "picks.json").write_text(json.dumps(made), encoding="utf-8")
    for name, picture in draw(found, shown.tolist()).items():
        (args.out / name).write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
