"""What the `moelora` command does to its own process: Ctrl-C, standard streams, warnings."""

import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ..console import OutputClosedError, naming_output, printable


def let_interrupts(*, end_at_once: bool) -> None:
    """Let Ctrl-C end the process there and then, without a word, or raise KeyboardInterrupt where things need an end.

    Where Ctrl-C is ignored, as in the background of a shell, it stays so.
    """
    handlers = (signal.default_int_handler, signal.SIG_DFL)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) in handlers:
        signal.signal(signal.SIGINT, handlers[end_at_once])


def replace_closed_streams() -> None:
    """Write to nowhere what would go to a stream that the caller closed: the next file opened would get its number."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def escape_what_cannot_be_encoded() -> None:
    """Print a name that the terminal's encoding lacks by its number, in place of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_output() -> None:
    """Write what still waits to be written to standard output.

    Raises:
        OutputClosedError: nobody reads it any more.
        OSError: it cannot be written.
    """
    if sys.stdout is not None:
        with naming_output("standard output"):
            sys.stdout.flush()


def failed_to_write(error: Exception) -> bool:
    """Whether safetensors or torch could not write a file: they say so in errors of their own, not in an OSError."""
    return re.search("I/O error|PytorchStreamWriter|unexpected pos|iostream error", str(error)) is not None


def drop_output() -> None:
    """Write to nowhere what cannot be written: Python tries again when it ends, and that must not fail."""
    try:
        flush_output()
    except (OSError, OutputClosedError):
        with suppress(OSError):  # no file of the system's
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def printable_warnings() -> Iterator[None]:
    """Within, warnings quote names as they may be printed."""
    format_warning = warnings.formatwarning
    warnings.formatwarning = lambda *arguments, **options: printable(format_warning(*arguments, **options), lines=True)
    try:
        yield
    finally:
        warnings.formatwarning = format_warning
