"""Read files that strangers wrote: regular files only, and whatever is in them, the error says what is wrong."""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

DEEPEST = 100
"""Levels that lists and mappings may lie in each other: whatever walks through them calls itself once for each."""


class NotReadableError(ValueError):
    """What is to be read is no regular file, or does not hold what it should; the message says why, not where."""


def expand_user(path: str | Path) -> Path:
    """A path with `~` as one's own folder; `~x` stays where nobody is called x, which Path.expanduser() fails on."""
    return Path(os.path.expanduser(path))


def real_path(path: str | Path) -> Path:
    """The whole path with links followed; a link that leads to itself stays, which Path.resolve() fails on."""
    return Path(os.path.realpath(path))


def real_path_or_hub_id(path: str, folder: Path) -> str:
    """The whole path of what lies in folder, unless it names something on the hub."""
    candidate = folder / expand_user(path)
    is_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or candidate.exists()
    return str(real_path(candidate)) if is_local else path


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


def read_json(path: str | Path, most_bytes: int | None = None) -> Any:
    """What a JSON file holds.

    Args:
        most_bytes: of the file; by default it may be of any size.

    Raises:
        NotReadableError: it is no regular file, is too large, or holds what [`parse_json`] refuses.
        OSError: it cannot be opened.
    """
    with open_regular(path) as stream:
        if most_bytes is not None and os.fstat(stream.fileno()).st_size > most_bytes:
            raise NotReadableError(f"it has more than {most_bytes:,} bytes")
        content = stream.read()
    try:
        return parse_json(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise NotReadableError("not UTF-8 text") from None


def parse_json(text: str) -> Any:
    """A value from JSON, which nests at most [`DEEPEST`] levels.

    Raises:
        NotReadableError: it is no JSON, nests deeper, or holds a number of thousands of digits.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise NotReadableError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise NotReadableError(_TOO_DEEP) from None
    except ValueError as error:  # Python's limit on the digits of an integer
        raise NotReadableError(f"not JSON that can be read ({error})") from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Refuse a value of lists and mappings that nests deeper than [`DEEPEST`] levels.

    Raises:
        NotReadableError: it does.
    """
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [inner for item in level if isinstance(item, (dict, list)) for inner in _parts(item)]
        if not level:
            return
    raise NotReadableError(_TOO_DEEP)


def _parts(item: dict[Any, Any] | list[Any]) -> Any:
    return item.values() if isinstance(item, dict) else item


_TOO_DEEP = f"lists and mappings lie in each other more than {DEEPEST} levels deep"
