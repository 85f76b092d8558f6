"""Before a run: its tokenizer, its text as tokens, and the sources of its batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dynmask.assets import load_tokenizer, model_folder
from dynmask.eval import prompts
from dynmask.train.corpus import Corpus
from dynmask.train.mixture import Sequences
from dynmask.train.mqar import Mqar, Recall
from dynmask.train.recipe import Recipe
from dynmask.train.sections import HubText, Retrieval, Text
from dynmask.train.source import Source
from dynmask.train.texts import Folder, Table, Texts
from dynmask.train.tokenizer import train_tokenizer
from dynmask.train.windows import Windows

EMBEDDED = "embedded"


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a run needs besides its recipe.

    Attributes:
        train: where its batches come from.
        valid: held-out data; None if the recipe evaluates nothing.
        tokenizer: saved beside the model; None for data without text.
        vocab_size: tokens that the data may hold.
    """

    train: Source
    valid: Source | None
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int


def prepare(recipe: Recipe, out: Path, *, path: str | None = None) -> Prepared:
    """Read, tokenise and check the data of a recipe; what was made is kept in ``out``.

    Args:
        recipe: the run.
        out: the run's folder: gets ``tokenizer`` and ``corpus``.
        path: where the data is, in place of the recipe's.

    Raises:
        ValueError: there is no such data or tokenizer, or it is too small.
    """
    check_data(recipe, path=path)
    data = recipe.data
    if isinstance(data, Mqar):
        recall = Recall(data)
        recall.require(recipe.longest)
        return Prepared(recall, recall if recipe.eval_every else None, None, data.vocab_size)
    data = dataclasses.replace(data, path=path or data.path)
    tokenizer = _tokenizer(recipe, _texts(data, data.train), out)
    # A dataset may be far larger than what the run reads.
    most = recipe.steps * recipe.tokens_per_step if isinstance(data, HubText) else None
    corpus = Corpus.build(
        _texts(data, data.train), tokenizer, cache=out / "corpus" / "train", most=most
    )
    train = _source(corpus, tokenizer, data)
    train.require(recipe.longest)
    valid: Source | None = None
    if recipe.eval_every:
        held_out = Corpus.build(
            _texts(data, data.valid),
            tokenizer,
            cache=out / "corpus" / "valid",
            most=most and min(most, 2 * recipe.eval_sequences * recipe.longest),
        )
        valid = _source(held_out, tokenizer, data)
        valid.require(recipe.longest)
    return Prepared(train, valid, tokenizer, len(tokenizer))


def check_data(recipe: Recipe, *, path: str | None = None) -> None:
    """Raise what `prepare` would for data that are not there, before anything is read.

    A dataset is only looked for when it is read.

    Args:
        recipe: the run.
        path: where the data is, in place of the recipe's.

    Raises:
        ValueError: there is no path, no such folder, or no file that matches.
    """
    data = recipe.data
    if isinstance(data, Mqar):
        if path is not None:
            raise ValueError("data: type mqar is generated; leave --data out")
        return
    path = path or data.path
    if path is None:
        raise ValueError("data: no path is given; use --data PATH")
    for split in (data.train, data.valid) if recipe.eval_every else (data.train,):
        texts = _texts(dataclasses.replace(data, path=path), split)
        if isinstance(texts, Folder):
            texts.files()


def _texts(data: Retrieval | Text | HubText, split: str) -> Texts:
    assert data.path is not None
    if isinstance(data, HubText):
        return Table(data.path, data.config, split, data.column)
    folder = model_folder().parent / "text" if data.path == EMBEDDED else Path(data.path)
    return Folder(folder, split, data.column if isinstance(data, Text) else "text")


def _source(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, data: Retrieval | Text | HubText
) -> Source:
    if isinstance(data, Retrieval):
        return Sequences(corpus, tokenizer, data.mixture)
    return Windows(corpus, tokenizer.eos_token_id, packed=data.packed)


def _tokenizer(recipe: Recipe, texts: Texts, out: Path) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer, that of the checkpoint it starts from, or one trained on the text."""
    kept = out / "tokenizer"
    name = recipe.tokenizer or recipe.model.get("from")
    if name == EMBEDDED:
        return load_tokenizer()
    if name is not None or kept.exists():
        try:
            return AutoTokenizer.from_pretrained(name or kept, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer: {name} cannot be loaded ({error})") from error
    tokenizer = train_tokenizer(
        _sample(texts, with_prompts=isinstance(recipe.data, Retrieval)),
        vocab_size=recipe.vocab_size,
        context=int(recipe.model.get("max_position_embeddings", recipe.longest)),
    )
    # Under another name first, so that an interruption leaves no half a tokenizer.
    partial = out / "tokenizer.partial"
    tokenizer.save_pretrained(partial)
    partial.rename(kept)
    return tokenizer


def _sample(texts: Texts, *, with_prompts: bool) -> Iterable[str]:
    """200,000 characters a document, of 10,000 documents at most; then the record's wording."""
    yield from (text[-200_000:] for text in islice(texts, 10_000))
    if with_prompts:
        wording = prompts.LINES_HEADER + prompts.official_question("x")
        wording += prompts.ruler_needle("x", 1)
        yield wording * 100 + prompts.record_line("x", 1) * 5000
