"""Where text comes from: a folder of files, or a dataset in Hugging Face's format."""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO

SUFFIXES = (".txt", ".txt.xz", ".jsonl", ".jsonl.xz")


class Texts(Protocol):
    """Documents, in an order that does not change."""

    def __iter__(self) -> Iterator[str]:
        """Yield each document."""

    def key(self) -> str:
        """Tell these documents from others, without reading them."""


@dataclass(frozen=True)
class Folder:
    """Documents of the text files in a folder; its own folders are not searched.

    A ``.txt`` file is one document, each row of a ``.jsonl`` file another; either may end in
    ``.xz``.

    Attributes:
        path: the folder.
        pattern: a glob on the file name, to take one split of a folder.
        column: the field of a row that holds the text.
    """

    path: Path
    pattern: str = "*"
    column: str = "text"

    def files(self) -> list[Path]:
        """The files, sorted by name.

        Raises:
            ValueError: none is there, or no such folder.
        """
        if not self.path.is_dir():
            wrong = "is a file; give its folder" if self.path.exists() else "does not exist"
            raise ValueError(f"data: the folder {self.path} {wrong}")
        found = sorted(p for p in self.path.glob(self.pattern) if p.name.endswith(SUFFIXES))
        if not found:
            raise ValueError(
                f"data: no {', '.join(SUFFIXES)} file matches {self.pattern!r} in {self.path}"
            )
        return found

    def __iter__(self) -> Iterator[str]:
        """Yield each document.

        Raises:
            ValueError: a row is no JSON object with a string in the column.
        """
        for path in self.files():
            with _open(path) as stream:
                if ".jsonl" not in path.suffixes:
                    yield stream.read()
                    continue
                for number, line in enumerate(stream, start=1):
                    try:
                        text = json.loads(line)[self.column]
                    except (ValueError, KeyError, TypeError, RecursionError):
                        text = None
                    if not isinstance(text, str):
                        raise ValueError(
                            f"data: {path.name} line {number} is no JSON object with a string "
                            f"{self.column!r}"
                        )
                    yield text

    def key(self) -> str:
        """Digest of the files' names and sizes."""
        digest = hashlib.sha256(self.column.encode())
        for path in self.files():
            digest.update(f"{path.name} {path.stat().st_size}".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Table:
    """Documents of a dataset of the Hugging Face hub, or of a folder that ``datasets`` can load.

    Attributes:
        path: the dataset's name or folder.
        config: its configuration, where it has several.
        split: the split.
        column: the column that holds the text.
    """

    path: str
    config: str | None = None
    split: str = "train"
    column: str = "text"

    def __iter__(self) -> Iterator[str]:
        """Yield each document.

        Raises:
            ImportError: ``datasets`` is not installed.
            ValueError: there is no such dataset, split or column.
        """
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                "data: type dataset needs datasets, which is not installed: pip install datasets"
            ) from error
        try:
            if (Path(self.path) / "dataset_dict.json").exists():
                rows = datasets.load_from_disk(self.path)[self.split]
            else:
                # Streamed, so that a run loads no more than it reads.
                rows = datasets.load_dataset(
                    self.path, self.config, split=self.split, streaming=True
                )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"data: split {self.split!r} of dataset {self.path} cannot be loaded ({error})"
            ) from error
        for row in rows:
            if not isinstance(row.get(self.column), str):
                raise ValueError(
                    f"data: column={self.column!r} of dataset {self.path} holds no text; a row has "
                    f"{', '.join(row)}"
                )
            yield row[self.column]

    def key(self) -> str:
        """Digest of the name, configuration, split and column."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


def _open(path: Path) -> TextIO:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")
