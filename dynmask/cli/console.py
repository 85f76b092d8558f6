"""Where the command writes: readable text, progress, and one line of JSON."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

#: `report(done, total, note)`: `done` of `total` steps are finished, `note` says what comes next.
Report = Callable[[int, int, str], None]

# Control characters save tab and newline, marks that turn the direction of text, and surrogates.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

#: Seconds between two progress lines where standard error is not a terminal.
LINE_INTERVAL = 5.0


class Output:
    """Readable text on standard output; with `as_json`, on standard error instead.

    Then standard output carries exactly one line: the document given to `finish`.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.errors = Console(stderr=True, highlight=False)
        self.human = self.errors if as_json else Console(highlight=False)

    def say(self, text: str = "", *, style: str | None = None) -> None:
        """Print one paragraph; the text is taken literally, without markup."""
        self.human.print(Text(visible(text), style=style or ""))

    def fail(self, text: str) -> None:
        """Print an error on standard error."""
        self.errors.print(Text(visible(text), style="bold red"))

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        left: int = 1,
        breaks: Sequence[int] = (),
    ) -> None:
        """Print a table.

        Args:
            title: Printed above; empty for none.
            columns: Names of the columns.
            rows: Cells as text.
            left: Number of columns, from the first, that are aligned left; the others hold
                figures and are aligned right.
            breaks: Indices of the rows that a line follows.
        """
        table = Table(
            title=Text(visible(title), style="bold") if title else None,
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
            header_style="dim",
        )
        for index, name in enumerate(columns):
            table.add_column(
                Text(name),
                justify="left" if index < left else "right",
                overflow="fold",
                no_wrap=index >= left,
            )
        for index, row in enumerate(rows):
            table.add_row(*(Text(visible(cell)) for cell in row), end_section=index in breaks)
        self.human.print(table)

    def finish(self, document: dict[str, Any]) -> None:
        """Write the document as the one line of JSON, if JSON was asked for."""
        if self.as_json:
            sys.stdout.write(json.dumps(document, allow_nan=False, default=str) + "\n")
            sys.stdout.flush()

    @contextmanager
    def progress(self, title: str) -> Iterator[Report]:
        """Show progress on standard error: a bar on a terminal, else a line now and then."""
        if self.errors.is_terminal:
            with _bar(self.errors) as bar:
                task = bar.add_task(title, total=None, note="")

                def report(done: int, total: int, note: str = "") -> None:
                    bar.update(task, completed=done, total=total, note=note)

                yield report
        else:
            yield self._lines(title)

    def _lines(self, title: str) -> Report:
        last = time.monotonic()

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal last
            if time.monotonic() - last < LINE_INTERVAL:
                return
            last = time.monotonic()
            self.errors.print(Text(f"{title}: {done} of {total}{f', {note}' if note else ''}"))

        return report


def visible(text: str) -> str:
    r"""Return text with what a terminal would obey, or cannot show, written out as ``\x1b``.

    Names in plans, results and models are somebody else's; an escape sequence in one could retitle
    the terminal, hide lines or fill the clipboard.
    """
    return _OBEYED.sub(lambda found: repr(found[0])[1:-1], text)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
        console=console,
        transient=True,
    )
