"""A folder of one json file and one safetensors file that is written whole and read verified.

`plan.json` names the tensors file, its size and its sha256, and carries a sha256 of its own
canonical form. The hashes find damage and careless edits; they are no signature.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from dynmask.dam.codec import check_fields, is_int

fcntl: Any
try:
    import fcntl
except ImportError:  # Not on Windows.
    fcntl = None

FORMAT = "dynmask-plan"
VERSION = 1
JSON_NAME = "plan.json"
_TENSORS_NAME = re.compile(r"tensors-[0-9a-f]{16}\.safetensors")
_OURS = re.compile(rf"{_TENSORS_NAME.pattern}|\.dynmask-[0-9a-f]{{16}}\.tmp")
#: A plan of 128 layers of 128 heads has about 1.5 MB of json.
_MAX_JSON_BYTES = 32 * 2**20


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Check that a plan can be written to `folder`; call it before long work.

    Raises:
        ValueError: `folder` is a file or a folder that holds something else, or nothing can be
            written there.
    """
    folder = Path(folder)
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            folder.lstat()
    except (OSError, ValueError) as error:  # A name that no file can have.
        raise ValueError(
            f"cannot write a plan to {str(folder)!r}: {getattr(error, 'strerror', None) or error};"
            " choose another folder"
        ) from error
    home = folder
    while not os.path.lexists(home) and home != home.parent:
        home = home.parent
    try:
        _check_target(folder)
        probe = home / _scratch_name()
        probe.mkdir()
        with contextlib.suppress(FileNotFoundError):  # A save tidied up.
            probe.rmdir()
    except OSError as error:
        raise ValueError(
            f"cannot write a plan to {folder}: {error.strerror or error} ({home}); choose another"
            " folder"
        ) from error


def write(folder: str | os.PathLike[str], body: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a plan folder, whole or not at all.

    A new folder is filled under a temporary name beside its place and renamed. In an existing plan
    the tensors file comes first, under a name made of its hash; replacing `plan.json`, which names
    it, is the one step that switches from the old plan to the new.

    Args:
        folder: Target: absent, empty, or a plan, which is replaced.
        body: The json's content without `format`, `version`, `tensors` and `sha256`.
        tensors: The tensors, contiguous, on the CPU.

    Raises:
        ValueError: The target is not a plan's place or cannot be written (see `check_writable`).
        OSError: Writing failed midway, as on a full disk; what was there before is intact.
    """
    folder = Path(folder).absolute()
    check_writable(folder)
    content = safetensors.torch.save(tensors)
    digest = hashlib.sha256(content).hexdigest()
    name = f"tensors-{digest[:16]}.safetensors"
    body = body | {
        "format": FORMAT,
        "version": VERSION,
        "tensors": {"file": name, "bytes": len(content), "sha256": digest},
    }
    body["sha256"] = _digest(body)
    text = json.dumps(body, indent=1, allow_nan=False).encode()

    files = {name: content, JSON_NAME: text}
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        # Inside the folder, since its parent may be read-only or another file system.
        with _locked(folder), _scratch(folder) as scratch:
            _fill(scratch, files)
            os.replace(scratch / name, folder / name)
            _sync_folder(folder)
            os.replace(scratch / JSON_NAME, folder / JSON_NAME)
            _sync_folder(folder)
            _tidy(folder, name)
    else:
        with _scratch(folder.parent) as scratch:
            _fill(scratch, files)
            os.rename(scratch, folder)
    _sync_folder(folder)
    _sync_folder(folder.parent)


def read_json(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and verify `plan.json`: size, syntax, format, version and its own hash.

    Returns:
        The whole body; what the fields hold is for the caller to check.

    Raises:
        ValueError: Names the file and the fault.
    """
    path = Path(folder) / JSON_NAME
    with _faults(path):
        size = _size(path)
        if size > _MAX_JSON_BYTES:
            raise ValueError(f"is {size} bytes, more than a plan's json may have")
        body = json.loads(
            _read_file(path, size), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f"is not a plan: it lacks format {FORMAT!r}")
        version = body.get("version")
        if not is_int(version, VERSION, VERSION):
            raise ValueError(
                f"has version {version!r}, and this dynmask reads version {VERSION}; calibrate"
                " again, or use the dynmask that wrote it"
            )
        if body.get("sha256") != _digest(body):
            raise ValueError("does not match its own sha256: it was changed after it was written")
    return body


def read_tensors(
    folder: str | os.PathLike[str], record: object, *, most_bytes: int
) -> dict[str, Tensor]:
    """Read and verify the tensors file that `plan.json` names.

    Args:
        folder: The plan's folder.
        record: The json's `tensors` record.
        most_bytes: The largest size that the rest of the json allows; checked before any reading.

    Raises:
        ValueError: Names the file and the fault.
    """
    with _faults(Path(folder) / JSON_NAME):
        checked = check_fields(
            record,
            {
                "file": lambda v: isinstance(v, str) and bool(_TENSORS_NAME.fullmatch(v)),
                "bytes": lambda v: is_int(v, 0, most_bytes),
                "sha256": is_sha256,
            },
            "tensors",
        )
    path = Path(folder) / checked["file"]
    with _faults(path):
        size = _size(path)
        if size != checked["bytes"]:
            raise ValueError(f"is {size} bytes, but {checked['bytes']} were written")
        content = _read_file(path, size)
        if hashlib.sha256(content).hexdigest() != checked["sha256"]:
            raise ValueError("does not match its sha256: it is damaged or of another plan")
        try:
            return safetensors.torch.load(content)
        # The last two come from torch, for sizes that no tensor can have.
        except (
            safetensors.SafetensorError,
            KeyError,
            TypeError,
            RuntimeError,
            OverflowError,
        ) as error:
            raise ValueError(f"is no safetensors file: {error}") from error


def canonical(body: object) -> bytes:
    """Return the one json text of `body` that hashes are taken of.

    Raises:
        ValueError: It holds NaN or infinity.
        TypeError: It holds something json has no form for.
    """
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def is_sha256(value: object) -> bool:
    """True for 64 lower-case hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _digest(body: dict[str, Any]) -> str:
    rest = {name: value for name, value in body.items() if name != "sha256"}
    return hashlib.sha256(canonical(rest)).hexdigest()


def _check_target(folder: Path) -> None:
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"cannot write a plan to {folder}: it is not a folder; choose another")
    names = {entry.name for entry in folder.iterdir()}
    ours = {name for name in names if _OURS.fullmatch(name)}
    # What a killed save left behind is no content, and a damaged plan may be replaced; but a lone
    # plan.json may be anybody's.
    if names == ours or (names == ours | {JSON_NAME} and any(map(_TENSORS_NAME.fullmatch, ours))):
        return
    try:
        read_json(folder)
    except ValueError as error:
        raise ValueError(
            f"cannot write a plan to {folder}: it holds something else; choose another folder or"
            f" remove it ({error})"
        ) from error


def _scratch_name() -> str:
    return f".dynmask-{secrets.token_hex(8)}.tmp"


@contextlib.contextmanager
def _scratch(home: Path) -> Iterator[Path]:
    """A new folder in `home`, removed at the end if it is still there."""
    scratch = home / _scratch_name()
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one save at a time change a folder; the lock ends with its process, also a killed one."""
    handle = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # Some network file systems have no locks.
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _fill(scratch: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        _write_file(scratch / name, content)
    _sync_folder(scratch)


def _tidy(folder: Path, name: str) -> None:
    """Remove the tensors of earlier plans, and what killed saves left behind."""
    for old in folder.iterdir():
        if old.name == name or not _OURS.fullmatch(old.name):
            continue
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


def _size(path: Path) -> int:
    """Size of a regular file: reading a device or a pipe might never end."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is a device or a pipe, no file")
    return status.st_size


def _read_file(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        content = file.read(size + 1)  # Not more, even if it grows meanwhile.
    if len(content) != size:
        raise ValueError("changed its size while it was read")
    return content


def _write_file(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # Not every system can open a folder; there the rename is as durable as the system makes it.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _faults(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong with a file into a ValueError that begins with its path."""
    try:
        yield
    except RecursionError as error:
        raise ValueError(f"{path}: is nested too deeply for a plan") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("has a key twice in one object")
    return body


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"holds {name}, which is no json number")
