"""Read files that strangers wrote: ordinary files only, and nothing in them ends in a traceback."""

import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from ..json_text import NotReadableError, parse_json

__all__ = ["NotReadableError", "expand_user", "open_regular", "parse_json", "read_json", "real_path"]


def expand_user(path: str | Path) -> Path:
    """A path with `~` as one's own folder; `~x` stays where nobody is called x, which Path.expanduser() fails on."""
    return Path(os.path.expanduser(path))


def real_path(path: str | Path) -> Path:
    """The whole path with links followed; a link that leads to itself stays, which Path.resolve() fails on."""
    return Path(os.path.realpath(path))


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read it. A pipe or a device may never end, so it is not opened at all.

    Raises:
        NotReadableError: it is something else than a file.
        OSError: it cannot be opened.
    """
    # Without O_NONBLOCK a pipe is waited for until somebody writes to it.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotReadableError("no regular file, but a folder, a pipe or a device; give a file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        NotReadableError: it is no regular file, or holds what [`parse_json`] refuses.
        OSError: it cannot be opened.
    """
    with open_regular(path) as stream:
        content = stream.read()
    try:
        return parse_json(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise NotReadableError("not UTF-8 text") from None
