"""The ``dynmask`` command.

Each subcommand is one module with ``HELP``, ``add_arguments(parser)`` and
``run(arguments, output) -> int``. Only the module of the subcommand that is named is imported, so
that ``dynmask --help`` does not wait for torch.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynmask.cli.console import Output

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

#: Subcommand: the line in the overview. Its module has the same name, save for `eval`.
COMMANDS = {
    "demo": "calibrate the embedded model, measure full and sparse attention, write a report",
    "calibrate": "make a mask plan for a model from texts",
    "inspect": "show what is in a plan",
    "eval": "measure a model, sparse or not: retrieval tasks, perplexity",
    "bench": "measure the engine against the fastest dense kernel, after a correctness check",
    "train": "train a model, dense or DMA, from a recipe",
    "report": "write a plan and results as one HTML page",
    "doctor": "check the installation: versions, machine, backends, embedded model",
}
_MODULES = {"eval": "evaluate"}

EXIT_CODES = """\
exit codes:
  0    ok
  1    a check failed, or an unexpected error
  2    bad input: an argument, a file or a plan that does not fit
  130  interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments without the program's name; default those of the process.

    Returns:
        0 ok, 1 failed check or unexpected error, 2 bad input, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = build_parser(words).parse_args(words)
        from dynmask.cli.console import Output
    except ImportError as error:
        sys.stderr.write(f"dynmask: {_missing(error)}\n")
        return FAILED
    except KeyboardInterrupt:  # imports take seconds, and may be interrupted as well
        return INTERRUPTED
    return _guarded(arguments, Output(as_json=arguments.json))


def build_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser; only the subcommands that occur in `words` get their arguments."""
    parser = argparse.ArgumentParser(
        prog="dynmask",
        description="Make long-context transformers fast with masks that follow the content.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(parser, default=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, line in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=line,
            description=line[0].upper() + line[1:] + ".",
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in words:
            module(name).add_arguments(command)
        # The common options may stand before or after the subcommand; SUPPRESS keeps the default
        # of the second from overwriting what the first has set.
        add_common(command, default=argparse.SUPPRESS)
    return parser


def module(name: str) -> ModuleType:
    """Import and return the module of a subcommand."""
    return importlib.import_module(f"dynmask.cli.{_MODULES.get(name, name)}")


def add_common(parser: argparse.ArgumentParser, *, default: bool | str) -> None:
    """Add --json and --debug; `default` is False, or argparse.SUPPRESS below the top level."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json",
        action="store_true",
        default=default,
        help="the last line of standard output is one line of JSON; text goes to standard error",
    )
    group.add_argument(
        "--debug", action="store_true", default=default, help="show the traceback of an error"
    )


def _guarded(arguments: argparse.Namespace, output: Output) -> int:
    try:
        return int(module(arguments.command).run(arguments, output))
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "interrupted"
    except ImportError as error:
        code, message = FAILED, _missing(error)
    except ValueError as error:
        code, message = BAD_INPUT, str(error)
        if arguments.debug:
            output.errors.print_exception()
    except Exception as error:  # whatever happens, the user gets a sentence and an exit code
        code = FAILED
        message = f"unexpected {type(error).__name__}: {error} (--debug shows where)"
        if arguments.debug:
            output.errors.print_exception()
    output.fail(f"dynmask {arguments.command}: {message}")
    with suppress(OSError):  # Standard output may be what failed.
        output.finish({"error": message, "exit_code": code})
    return code


def _missing(error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is missing; run: pip install 'dynmask[hf,report]'"
    return str(error)
