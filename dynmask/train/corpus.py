"""Reading a folder of text: documents, token ids, and the words that training keys are made of."""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from dynmask.eval.words import is_eval_word

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

_WORD = re.compile(r"\b[a-z]{3,10}\b")
_SUFFIXES = (".txt", ".txt.xz", ".jsonl", ".jsonl.xz")


def text_files(folder: Path | str, pattern: str = "*") -> list[Path]:
    """The text files of ``folder`` (``.txt``, ``.jsonl``, either with ``.xz``), sorted by name.

    Args:
        folder: where to look; its own folders are not searched.
        pattern: a glob on the file name, to take one split of a folder.

    Raises:
        ValueError: no such file is there.
    """
    files = sorted(p for p in Path(folder).glob(pattern) if p.name.endswith(_SUFFIXES))
    if not files:
        raise ValueError(f"data: no {', '.join(_SUFFIXES)} file matches {pattern!r} in {folder}")
    return files


def documents(files: list[Path]) -> Iterator[str]:
    """Yield each document: a whole ``.txt`` file, or the field ``text`` of each ``.jsonl`` row.

    Raises:
        ValueError: a row is no JSON object with a string ``text``.
    """
    for path in files:
        with _open(path) as stream:
            if ".jsonl" not in path.suffixes:
                yield stream.read()
                continue
            for number, line in enumerate(stream, start=1):
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError):
                    text = None
                if not isinstance(text, str):
                    raise ValueError(
                        f"data: {path.name} line {number} is no JSON object with a string 'text'"
                    )
                yield text


def _open(path: Path) -> TextIO:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised documents end to end.

    Attributes:
        tokens: ids ``[T]`` uint16, documents one after the other, each closed by the end token.
        words: lower-case words of training, in falling order of frequency (never a word that
            belongs to the evaluation, see ``dynmask.eval.words``).
    """

    tokens: np.ndarray
    words: list[str]

    @classmethod
    def build(
        cls, files: list[Path], tokenizer: PreTrainedTokenizerFast, *, cache: Path | None = None
    ) -> Corpus:
        """Tokenise ``files``; with ``cache`` (a ``.npz`` path) do so once.

        The cache is keyed by the tokenizer and by the files' names and sizes.

        Args:
            files: what ``documents`` reads.
            tokenizer: a fast tokenizer with an end-of-sequence token and at most 65,536 entries.
            cache: where to keep the result.

        Raises:
            ValueError: the tokenizer does not fit, or a file cannot be read as text.
        """
        end = tokenizer.eos_token_id
        if end is None or len(tokenizer) > 65536:
            raise ValueError(
                f"tokenizer: an end-of-sequence token and at most 65536 entries are needed, got "
                f"eos_token_id={end} and {len(tokenizer)} entries"
            )
        digest = _digest(files, tokenizer)
        if cache is not None and cache.exists():
            with np.load(cache, allow_pickle=False) as saved:
                if str(saved["digest"]) == digest:
                    return cls(saved["tokens"], str(saved["words"]).split())
        pieces: list[np.ndarray] = []
        counts: Counter[str] = Counter()
        for text in documents(files):
            counts.update(_WORD.findall(text))
            # Paragraphs in parallel: the pre-tokenizer never joins a word to the line end after it.
            parts = re.split(r"(?<=\S)(?=\n)", text)
            encoded = tokenizer.backend_tokenizer.encode_batch_fast(parts, add_special_tokens=False)
            pieces.extend(np.asarray(part.ids, dtype=np.uint16) for part in encoded)
            pieces.append(np.asarray([end], dtype=np.uint16))
        tokens = np.concatenate(pieces)
        words = [w for w, n in counts.most_common() if n >= 5 and not is_eval_word(w)]
        log.info("%d tokens, %d key words in %d files", len(tokens), len(words), len(files))
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            # Under another name first, so that an interruption leaves no half a cache.
            partial = cache.with_name(f"partial-{cache.name}")
            np.savez(partial, tokens=tokens, words=" ".join(words), digest=digest)
            os.replace(partial, cache)
        return cls(tokens, words)

    def require(self, tokens: int) -> None:
        """Raise unless a sequence of so many tokens can be cut from the text.

        Raises:
            ValueError: the text is shorter.
        """
        if len(self.tokens) < tokens:
            raise ValueError(
                f"data: the text has {len(self.tokens)} tokens, one sequence {tokens}; "
                f"give more text or take shorter sequences"
            )

    def sha256(self) -> str:
        """Digest of tokens and words: equal for equal training data."""
        digest = hashlib.sha256(self.tokens.tobytes())
        digest.update(" ".join(self.words).encode())
        return digest.hexdigest()


def _digest(files: list[Path], tokenizer: PreTrainedTokenizerFast) -> str:
    key = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    for path in files:
        key.update(f"{path.name} {path.stat().st_size}".encode())
    return key.hexdigest()
