"""A command's page, from its parser: what ``--help`` says, subcommand by subcommand."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from dynmask.cli import COMMANDS, build_parser

__all__ = ["COMMANDS", "command_page", "parsers_of"]


def parsers_of(command: str) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of a command and its subcommands by the words that call them."""
    top = _subparsers(build_parser([command]))
    assert top is not None
    found = {f"dynmask {command}": top[command]}
    for name, parser in (_subparsers(top[command]) or {}).items():
        found[f"dynmask {command} {name}"] = parser
    return found


def command_page(command: str) -> str:
    """Return a command's page in Markdown."""
    parts = [f"# dynmask {command}", ""]
    for words, parser in parsers_of(command).items():
        if words.count(" ") > 1:
            parts += [f"## {words}", ""]
        parts += [_sentence(parser.description), "", "```text", _usage(parser), "```", ""]
        parts += _groups(parser)
        if parser.epilog:
            parts += ["```text", parser.epilog.strip(), "```", ""]
    return "\n".join(parts)


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser] | None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return None


def _usage(parser: argparse.ArgumentParser) -> str:
    formatter = argparse.HelpFormatter(parser.prog, width=76)
    formatter.add_usage(None, parser._actions, parser._mutually_exclusive_groups)
    return formatter.format_help().strip()


def _groups(parser: argparse.ArgumentParser) -> Iterator[str]:
    for group in parser._action_groups:
        shown = [a for a in group._group_actions if not isinstance(a, argparse._HelpAction)]
        shown = [a for a in shown if a.help is not argparse.SUPPRESS]
        if not shown:
            continue
        yield f"**{(group.title or 'arguments').capitalize()}**"
        yield ""
        for action in shown:
            if isinstance(action, argparse._SubParsersAction):
                for choice in action._choices_actions:
                    yield from _entry(choice.dest, choice.help)
            else:
                yield from _entry(_call(action), action.help, action)


def _entry(call: str, text: str | None, action: argparse.Action | None = None) -> Iterator[str]:
    if text and action and "%(" in text:
        text %= vars(action)
    notes = [_sentence(text)] if text else []
    if action and action.choices and action.metavar is None:
        notes.append(f"One of {', '.join(f'`{c}`' for c in action.choices)}.")
    if action and action.required and action.option_strings:
        notes.append("Required.")
    yield from (f"`{call}`", f":   {' '.join(notes) or 'See the guide.'}", "")


def _call(action: argparse.Action) -> str:
    name = action.metavar or action.dest.upper()
    name = name if isinstance(name, str) else " ".join(name)
    values = {0: "", None: name, "+": f"{name} ...", "*": f"[{name} ...]"}.get(action.nargs, name)
    return ", ".join(f"{option} {values}".strip() for option in action.option_strings) or name


def _sentence(text: str | None) -> str:
    text = (text or "").strip().replace("<", "&lt;").replace("*", r"\*")
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", ":")) else f"{text}."
