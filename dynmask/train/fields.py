"""Dataclasses from YAML, checked: whatever does not fit is refused by the name of its field."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from dynmask.train.loader import parse


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return _integer(value) or isinstance(value, float)


def _pair(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(of, value))


_FITS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    int: (_integer, "an integer"),
    float: (_number, "a number (YAML wants a point in 2.0e-3)"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    str: (lambda value: isinstance(value, str), "a string"),
    tuple[int, int]: (lambda value: _pair(value, _integer), "a list of two integers"),
    tuple[float, float]: (lambda value: _pair(value, _number), "a list of two numbers"),
    dict[str, Any]: (lambda value: isinstance(value, dict), "a mapping of fields"),
}
"""For each annotation: what YAML may hold there, and its name."""


def read(kind: type, raw: Any, where: str) -> Any:
    """Make a dataclass of what YAML holds.

    A field may be a number, a string, a truth value, a pair, a mapping, another dataclass, a list
    of one (``tuple[Phase, ...]``), or one of several, told apart by their attribute ``type``.

    Args:
        kind: The dataclass.
        raw: What was read.
        where: Where it stands, for messages.

    Raises:
        ValueError: A field is unknown, missing or of another type; or the class refuses its values.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: {raw!r:.80} is not a mapping of fields")
    known = {f.name: f for f in fields(kind)}
    check_names(raw, known, where)
    for name, f in known.items():
        if name not in raw and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{where}: the field {name!r} is missing")
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], raw[name], name, where) for name in raw})


def check_names(given: Iterable[Any], known: Iterable[str], where: str) -> None:
    """Refuse names that are not known, with what was probably meant.

    Args:
        given: Names of fields.
        known: Those that there are.
        where: Where they stand, for messages.

    Raises:
        ValueError: A name is not known.
    """
    known = list(known)
    unknown = sorted(str(name) for name in given if name not in known)
    if not unknown:
        return
    close = {name: get_close_matches(name, known, n=1) for name in unknown}
    named = (f"{n} (did you mean {close[n][0]}?)" if close[n] else n for n in unknown)
    raise ValueError(f"{where}: unknown field {', '.join(named)}; known are {', '.join(known)}")


def _value(hint: Any, value: Any, name: str, where: str) -> Any:
    if get_origin(hint) in (Union, UnionType):
        options = [option for option in get_args(hint) if option is not NoneType]
        if value is None and len(options) < len(get_args(hint)):
            return None
        if len(options) > 1:
            return _one_of(options, value, f"{where}: {name}")
        (hint,) = options
    if is_dataclass(hint):
        return read(hint, value, f"{where}: {name}")  # type: ignore[arg-type]
    if get_origin(hint) is tuple and get_args(hint)[1:] == (Ellipsis,):
        if not isinstance(value, list):
            raise ValueError(f"{where}: {name}={value!r:.80} must be a list")
        return tuple(read(get_args(hint)[0], item, f"{where}: {name}") for item in value)
    fits, wanted = _FITS[hint]
    if not fits(value):
        raise ValueError(f"{where}: {name}={value!r:.80} must be {wanted}")
    return tuple(value) if isinstance(value, list) else value


def _one_of(options: list[Any], value: Any, where: str) -> Any:
    by_type = {option.type: option for option in options}
    chosen = value.get("type") if isinstance(value, dict) else None
    if not isinstance(chosen, str) or chosen not in by_type:
        raise ValueError(f"{where}: type={chosen!r:.80} must be one of {', '.join(by_type)}")
    rest = {name: part for name, part in value.items() if name != "type"}
    return read(by_type[chosen], rest, where)


def plain(value: Any) -> Any:
    """Return a dataclass as YAML and JSON hold it: what `read` takes, defaults filled in."""
    if is_dataclass(value):
        kind = {"type": value.type} if hasattr(value, "type") else {}
        return kind | {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Name where two plain values differ: ``"lr: 0.001 was 0.002"``."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*new, *(key for key in old if key not in new)]
        return [
            line
            for key in names
            for line in differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if old == new else [f"{name}: {new!r} was {old!r}"]


def changed(raw: Any, settings: list[str]) -> Any:
    """Return a copy of ``raw`` with ``key=value`` settings applied.

    Args:
        raw: What YAML held.
        settings: ``"lr=1e-3"``, ``"model.num_hidden_layers=2"``, ``"phases.0.steps=10"``; a value
            is read as YAML, save that ``1e-3`` is a number here.

    Raises:
        ValueError: A setting has no ``=``, or leads nowhere.
    """
    raw = deepcopy(raw)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise ValueError(f"--set {setting}: write KEY=VALUE, for example lr=1.0e-3")
        *parents, last = path.split(".")
        at = raw
        try:
            for key in parents:
                at = at[int(key)] if isinstance(at, list) else at.setdefault(key, {})
            at[int(last) if isinstance(at, list) else last] = _scalar(text)
        except (ValueError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"--set {setting}: the recipe has no place {path}") from error
    return raw


def _scalar(text: str) -> Any:
    try:
        value = parse(text)
    except (ValueError, yaml.YAMLError):
        return text  # such as the glob *.txt
    if isinstance(value, str):
        try:
            return float(value)  # YAML takes 1e-3 for a string
        except ValueError:
            return value
    return value
