"""The consoles that everything is printed on, and what text from users and files looks like there.

Progress and messages go to standard error, so that standard output holds results only. Names, paths and texts may come
from strangers' folders: nothing in them is markup, and what would steer a terminal is shown, not sent.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

T = TypeVar("T")

NARROWEST = 40  # columns; rich fails to lay out tables where there is room for nothing


def number_from_launcher(variable: str, default: int) -> int:
    """What a launcher says of this process; what is no number comes from somebody else, and counts for nothing."""
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else default


# Launchers number the processes of a run. All of them compute, one writes and talks.
is_main_process = number_from_launcher("RANK", 0) == 0

# What terminals obey: C0 and C1 controls, the separators that break lines, marks that turn text round. And halves of
# characters, which no encoding can write. Joiners stay: scripts and emoji are written with them.
_STEERS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class OutputClosedError(Exception):
    """Nobody reads what is printed any more, as after `| head`."""


@contextmanager
def naming_output(name: str) -> Iterator[None]:
    """Within, errors of writing to a standard stream name it.

    Raises:
        OutputClosedError: nobody reads it any more.
        OSError: with the name as that of the file.
    """
    try:
        yield
    except BrokenPipeError:
        raise OutputClosedError from None
    except OSError as error:
        error.filename = error.filename or name
        raise


def print_exactly(text: str, end: str = "\n") -> None:
    """Print text on standard output as it is: for programs, which no character of it steers."""
    with naming_output("standard output"):
        print(text, end=end, flush=True)


def printable(text: object, *, lines: bool = False) -> str:
    r"""Text as it may be printed: whatever would steer a terminal as a visible escape.

    Args:
        lines: keep line breaks and tabs, as a message of several lines needs them; a name or a path has none.

    >>> print(printable("a\x1b[2J\nb"), printable("two\nlines\x07", lines=True))
    a\x1b[2J\nb two
    lines\x07
    """

    def escape(found: re.Match[str]) -> str:
        character = found[0]
        return character if lines and character in "\n\t" else character.encode("unicode_escape").decode("ascii")

    return _STEERS.sub(escape, str(text))


class _PlainConsole(Console):
    """Prints text as it is: no markup, no names of emoji, nothing that steers the terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, quiet=not is_main_process, **options)
        if self.width < NARROWEST:
            self.width = NARROWEST

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string on its way to the console, cells and titles of tables too."""
        return super().render_str(printable(text, lines=True), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """See Console."""
        with naming_output("standard error" if self.stderr else "standard output"):
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """What rich does where nobody reads the output any more."""
        raise OutputClosedError


console = _PlainConsole(stderr=True)


def make_stdout() -> Console:
    """A console on standard output, as wide as the terminal now is."""
    return _PlainConsole()


def make_table(
    title: str | None, left: Sequence[str], right: Sequence[str], rows: Iterable[Sequence[str]], **style: Any
) -> Table:
    """A table of rows, the heads of whose columns are `left`, aligned so, and `right`."""
    table = Table(title=title, **style)
    for column in left:
        table.add_column(printable(column), overflow="fold")
    for column in right:
        table.add_column(printable(column), justify="right")
    for row in rows:
        table.add_row(*map(printable, row))
    return table


def progress_bar(*, transient: bool = True) -> Progress:
    """Bars on standard error that go away at the end where they are transient."""
    return Progress(
        TextColumn("{task.description}", style="progress.description", markup=False),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        transient=transient,
    )


def track(items: Iterable[T], description: str, *, transient: bool = False) -> Iterator[T]:
    """The items, with a progress bar on standard error."""
    with progress_bar(transient=transient) as bar:
        yield from bar.track(items, description=printable(description))


@contextmanager
def track_reading(file: BinaryIO, size: int, description: str) -> Iterator[Any]:
    """The file, with a transient progress bar of how much of its `size` bytes was read."""
    with progress_bar() as bar:
        yield bar.wrap_file(file, total=size, description=printable(description))
