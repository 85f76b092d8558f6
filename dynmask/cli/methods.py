"""The options that choose another method, and how it meets a question."""

from __future__ import annotations

import argparse
import ast
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynmask.baselines import Policy

#: Written out, so that the parser need not import torch; a test compares them with the methods.
NAMES = (
    *("window", "streaming", "h2o", "snapkv", "infllm", "quest"),
    *("topk", "top-p", "vertical-slash", "xattention"),
)


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --method and --set."""
    parser.add_argument(
        "--method",
        choices=NAMES,
        metavar="NAME",
        help=f"another method instead of --mode: {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the method, as in its class in dynmask.baselines; may be repeated",
    )


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says how a prompt and its question meet the cache."""
    parser.add_argument(
        "--whole",
        action="store_true",
        help="read each prompt with its question at once, for each question anew; else a prompt "
        "is read once and what it keeps does not know the questions",
    )
    parser.add_argument(
        "--sparse-decode",
        action="store_true",
        help="decode from run.cache(): steps look at the blocks that they choose; with --mode",
    )
    parser.add_argument(
        "--max-cache-tokens",
        type=int,
        metavar="N",
        help="hard cap on the tokens that each layer keeps, implies --whole; with --mode",
    )


def policy_of(arguments: argparse.Namespace) -> Policy | None:
    """Return the method asked for, or None.

    Raises:
        ValueError: A setting is unknown or out of range, or does not go with the other options.
    """
    if arguments.method is None:
        if arguments.set:
            raise ValueError("--set is for the settings of a --method; add one")
        return None
    from dynmask.baselines import METHODS

    given = {
        "--plan": arguments.plan,
        "--mode": arguments.mode,
        "--coverage": arguments.coverage,
        "--sparse-decode": getattr(arguments, "sparse_decode", False) or None,
        "--max-cache-tokens": getattr(arguments, "max_cache_tokens", None),
    }
    beside = [name for name, value in given.items() if value is not None]
    if beside:
        raise ValueError(f"--method runs alone: leave {', '.join(beside)} out")
    method = METHODS[arguments.method]
    known = [field.name for field in fields(method)]  # type: ignore[arg-type]
    settings: dict[str, Any] = {}
    for item in arguments.set:
        name, sign, value = item.partition("=")
        if not sign or name not in known:
            raise ValueError(
                f"--set {item}: write NAME=VALUE; {arguments.method} has {', '.join(known)}"
            )
        settings[name] = _value(value)
    try:
        return method(**settings)
    except TypeError as error:
        raise ValueError(f"--set: {error}") from error


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
