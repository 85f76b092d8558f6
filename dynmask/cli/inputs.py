"""Models, texts and places that the user names."""

from __future__ import annotations

import argparse
import json
import lzma
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

EMBEDDED = "embedded"

#: Most bytes of a file of texts, unpacked: a small .xz file may unpack to any size.
MAX_TEXT_BYTES = 2**30


class Loaded(NamedTuple):
    """A causal language model with its tokenizer and the name to show for it."""

    model: Any
    tokenizer: Any
    name: str


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --model, --device and --dtype."""
    parser.add_argument(
        "--model",
        default=EMBEDDED,
        metavar="FOLDER_OR_ID",
        help="a transformers model folder or hub name, or 'embedded' (default)",
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: auto"
    )
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="default: auto"
    )


def load(name: str, *, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Load a model for evaluation.

    Args:
        name: A folder, a hub name, or ``"embedded"``.
        device: ``"auto"`` is CUDA where there is one, else the CPU.
        dtype: ``"auto"`` is float32 on the CPU, where bfloat16 is often slower, and bfloat16 on
            CUDA.

    Raises:
        ValueError: There is no such model, it is no causal language model, or CUDA is asked for
            and missing.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    # Its bars would run into ours.
    transformers_logging.disable_progress_bar()
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    torch_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if name == EMBEDDED:
        from dynmask.assets import load_model, load_tokenizer

        # Any: the stub of transformers' decorated `to` takes no device.
        model: Any = load_model(dtype=torch_dtype)
        tokenizer = load_tokenizer()
        name = "the embedded model"
    else:
        model, tokenizer = _from_transformers(name, torch_dtype)
        name = Path(name).name if Path(name).is_dir() else name
    known = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > known:
        raise ValueError(
            f"--model {name}: its tokenizer has {tokenizer.vocab_size} tokens, the model {known}: "
            "put the model's own tokenizer into the folder"
        )
    return Loaded(model.to(device).eval(), tokenizer, name)


def _from_transformers(name: str, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import dynmask.dma  # Makes its models known to transformers, as the next does.

    with suppress(ImportError):  # They come with the training extra.
        import dynmask.train.variants  # noqa: F401
    if name.startswith((".", "~", os.sep)) and not Path(name).expanduser().is_dir():
        raise ValueError(f"--model {name}: there is no such folder")
    try:
        folder = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
        # No code of the folder's is run or offered to be, and nothing is unpickled.
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ImportError:  # A package is missing: another message, another exit code.
        raise
    except Exception as error:  # Damaged files end in many of them.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"--model {name}: transformers cannot load it as a causal language model with its "
            f"tokenizer ({reason})"
        ) from error
    # Of a folder without the tokenizer's files transformers may make a tokenizer without a
    # vocabulary, which turns any text into nothing.
    if not tokenizer("A line of text.", add_special_tokens=False)["input_ids"]:
        raise ValueError(
            f"--model {name}: its tokenizer makes no tokens of text; save the model's own "
            "tokenizer beside it: tokenizer.save_pretrained(folder)"
        )
    return model, tokenizer


def read_texts(paths: Sequence[str]) -> list[str]:
    """Read texts: one for each .txt file, one for each line of a .jsonl file with a "text" field.

    Either may be compressed with xz (``.txt.xz``, ``.jsonl.xz``).

    Raises:
        ValueError: A file is missing, damaged, of another kind, or all of them are empty.
    """
    texts = [text for path in paths for text in _read_file(Path(path)) if text.strip()]
    if not texts:
        raise ValueError(f"--texts: no text in {', '.join(map(str, paths))}")
    return texts


def _read_file(path: Path) -> list[str]:
    kinds = path.suffixes[-2:] if path.suffix == ".xz" else path.suffixes[-1:]
    if not kinds or kinds[0] not in (".txt", ".jsonl"):
        raise ValueError(f"--texts {path}: give a .txt or .jsonl file, or either with .xz")
    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            data = _read(file, MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            raise ValueError(
                f"--texts {path}: over {MAX_TEXT_BYTES / 2**30:g} GiB of text; split the file"
            )
        content = data.decode("utf-8")
    except OSError as error:
        raise ValueError(f"--texts {path}: {error.strerror}") from error
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"--texts {path}: damaged, or not what its name says ({error})") from error
    if kinds[0] == ".txt":
        return [content]
    return [
        _record(path, number, line)
        for number, line in enumerate(content.split("\n"), 1)
        if line.strip()
    ]


def _read(file: IO[bytes], most: int) -> bytes:
    """Read at most so many bytes, and take no memory for more than there are."""
    content = bytearray()
    while part := file.read(min(2**20, most - len(content))):
        content += part
    return bytes(content)


def _record(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--texts {path}, line {number}: not JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'--texts {path}, line {number}: needs a string under the key "text"')
    text: str = record["text"]
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"--texts {path}, line {number}: half a surrogate pair is no text")
    return text


def check_writable(path: str | os.PathLike[str], *, option: str = "--out") -> Path:
    """Check that a file can be made at `path`, before any work is done for it.

    Creates the parent folders. Returns the path.

    Raises:
        ValueError: It cannot; the message names the option.
    """
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"{option} {target}: is a folder; name a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".dynmask-"):
            pass
    except OSError as error:
        raise ValueError(
            f"{option} {target}: cannot write there ({error.strerror}); choose another place"
        ) from error
    return target


def write_text(target: Path, text: str) -> None:
    """Write to a temporary file beside `target`, then rename it: whole or not at all."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
