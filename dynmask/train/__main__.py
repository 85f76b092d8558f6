"""``python -m dynmask.train RECIPE --data FOLDER --out FOLDER``: train a model from a recipe."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from dynmask.eval import prompts
from dynmask.train.corpus import Corpus, documents, text_files
from dynmask.train.mixture import Sequences
from dynmask.train.recipe import Recipe, named_recipes
from dynmask.train.run import claim, train
from dynmask.train.tokenizer import train_tokenizer


def make_tokenizer(files: list[Path], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train the recipe's tokenizer on 200,000 characters a document and on the record's wording."""
    texts = [text[-200_000:] for text in documents(files)]
    wording = prompts.LINES_HEADER + prompts.official_question("x") + prompts.ruler_needle("x", 1)
    texts.append(wording * 100 + prompts.record_line("x", 1) * 5000)
    return train_tokenizer(texts, vocab_size=recipe.vocab_size, context=recipe.context)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dynmask.train",
        description="Train a small model that can look things up, from a recipe and a folder of "
        "text. A run that was stopped goes on if the same command is given again.",
        epilog="Exit codes: 0 the run is complete, 2 wrong arguments or data, 3 stopped by "
        "--minutes before the end.",
    )
    parser.add_argument(
        "recipe", help=f"a YAML file, or a recipe of the package: {', '.join(named_recipes())}"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="FOLDER",
        help="text: .txt files, or .jsonl with a field 'text'; either with .xz too",
    )
    parser.add_argument(
        "--pattern",
        default="train*",
        metavar="GLOB",
        help="which files of FOLDER (default: train*)",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FOLDER", help="where the run is kept"
    )
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="a tokenizer to use (default: train one)"
    )
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="stop after M minutes with a checkpoint"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        default=max(1, (os.cpu_count() or 2) - 2),
        help="processes that make batches (default: all cores but two)",
    )
    return parser


def _prepare(
    chosen: argparse.Namespace, recipe: Recipe
) -> tuple[Sequences, PreTrainedTokenizerFast]:
    files = text_files(chosen.data, chosen.pattern)
    kept = chosen.out / "tokenizer"
    if chosen.tokenizer or kept.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(chosen.tokenizer or kept)
    else:
        tokenizer = make_tokenizer(files, recipe)
        # Under another name first, so that an interruption leaves no half a tokenizer.
        partial = chosen.out / "tokenizer.partial"
        tokenizer.save_pretrained(partial)
        partial.rename(kept)
    corpus = Corpus.build(files, tokenizer, cache=chosen.out / "corpus.npz")
    sequences = Sequences(corpus, tokenizer, recipe.mixture)
    claim(chosen.out, recipe, sequences)
    return sequences, tokenizer


def main(arguments: list[str] | None = None) -> int:
    """Train; returns 0 when complete, 3 when stopped by ``--minutes`` before the end."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        recipe = Recipe.load(chosen.recipe)
        sequences, tokenizer = _prepare(chosen, recipe)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    done = train(
        recipe,
        sequences,
        tokenizer,
        chosen.out,
        minutes=chosen.minutes,
        workers=chosen.workers,
    )
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
