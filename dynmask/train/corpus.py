"""Reading a folder of text: documents, token ids, and the words that training keys are made of."""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynmask.eval.words import is_eval_word

log = logging.getLogger(__name__)

_WORD = re.compile(r"\b[a-z]{3,10}\b")
_SUFFIXES = (".txt", ".txt.xz", ".jsonl", ".jsonl.xz")


def text_files(folder: Path | str, pattern: str = "*") -> list[Path]:
    """The text files of ``folder`` (``.txt``, ``.jsonl``, either with ``.xz``), sorted by name.

    Args:
        folder: where to look; not searched deeper.
        pattern: a glob on the file name, to take one split of a folder.

    Raises:
        ValueError: no such file is there.
    """
    files = sorted(p for p in Path(folder).glob(pattern) if p.name.endswith(_SUFFIXES))
    if not files:
        raise ValueError(f"data: no {', '.join(_SUFFIXES)} file matches {pattern!r} in {folder}")
    return files


def documents(files: list[Path]) -> Iterator[str]:
    """Yield each document: a whole ``.txt`` file, or the field ``text`` of each ``.jsonl`` row."""
    for path in files:
        stream = lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open()
        with stream:
            if ".jsonl" not in path.name:
                yield stream.read()
                continue
            for number, line in enumerate(stream, start=1):
                row = json.loads(line)
                if not isinstance(row.get("text"), str):
                    raise ValueError(f"data: {path.name} line {number} has no field 'text'")
                yield row["text"]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised documents end to end.

    Attributes:
        tokens: ids ``[T]`` uint16, documents one after the other, each closed by the end token.
        ends: ``[documents]`` int64, the position after each document.
        words: lower-case words of training, in falling order of frequency (never a word that
            belongs to the evaluation, see ``dynmask.eval.words``).
    """

    tokens: np.ndarray
    ends: np.ndarray
    words: list[str]

    @classmethod
    def build(cls, files: list[Path], tokenizer, cache: Path | None = None) -> Corpus:  # type: ignore[no-untyped-def]
        """Tokenise ``files``; with ``cache`` (a ``.npz`` path) do so once.

        The cache is keyed by the tokenizer and by the files' names and sizes.
        """
        key = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
        for path in files:
            key.update(f"{path.name} {path.stat().st_size}".encode())
        digest = key.hexdigest()
        if cache is not None and cache.exists():
            with np.load(cache, allow_pickle=False) as saved:
                if str(saved["digest"]) == digest:
                    return cls(saved["tokens"], saved["ends"], str(saved["words"]).split())
        end = tokenizer.eos_token_id
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
        ends = np.flatnonzero(tokens == end).astype(np.int64) + 1
        words = [w for w, n in counts.most_common() if n >= 5 and not is_eval_word(w)]
        log.info("%d documents, %d tokens, %d key words", len(ends), len(tokens), len(words))
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            np.savez(cache, tokens=tokens, ends=ends, words=" ".join(words), digest=digest)
        return cls(tokens, ends, words)
