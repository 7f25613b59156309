"""Where files are written out of sight before they are renamed, and where what they replace is kept.

Whoever makes such a place holds a lock on it, which the system takes back when the process ends, however it ends. So a
place that nobody holds is abandoned, and whoever writes to the same target next removes it. What a folder held that is
replaced lies beside it as `NAME.backup-N`, from where `moelora undo` brings it back.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and nothing counts as abandoned
    fcntl = None  # type: ignore[assignment]


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A path with target's name, on its file system, for the block to make a file or folder at; gone after the block.

    Neither exists yet: the path itself is the caller's to make and to rename to target.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    outside, descriptor = _make(target)
    try:
        yield outside / target.name
    finally:
        shutil.rmtree(outside, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def only_process_in(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if need be, against others that ask for the same.

    Raises:
        BlockingIOError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def kept_place(folder: Path, kind: str, number: int) -> Path:
    """Where a folder is kept that had this one's name; kind is "backup", or "undone"."""
    return folder.with_name(f"{folder.name}.{kind}-{number}")


def kept_numbers(folder: Path, kind: str) -> list[int]:
    """The numbers of the folders of a kind that are kept beside a folder."""
    prefix = f"{folder.name}.{kind}-"
    names = [path.name.removeprefix(prefix) for path in folder.parent.glob("*") if path.name.startswith(prefix)]
    return [int(name) for name in names if name.isdecimal()]


def next_kept_place(folder: Path, kind: str) -> Path:
    """Where to keep a folder next."""
    return kept_place(folder, kind, max(kept_numbers(folder, kind), default=0) + 1)


def holds_something(folder: Path) -> bool:
    """Whether a folder is there and is not empty, so that replacing it would lose something."""
    return folder.is_dir() and any(folder.iterdir())


def _make(target: Path) -> tuple[Path, int | None]:
    while True:
        outside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        try:
            descriptor = _lock(outside)
        except (BlockingIOError, FileNotFoundError):  # another process took it for abandoned before it was locked
            continue
        if outside.is_dir():
            return outside, descriptor
        if descriptor is not None:
            os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    pattern = re.compile(re.escape(f".{target.name}.") + r"\w{8}\.tmp")
    for path in target.parent.iterdir():
        if pattern.fullmatch(path.name):
            try:
                descriptor = _lock(path)
            except OSError:  # in use, or another process has just removed it
                continue
            if descriptor is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """A descriptor whose closing gives the folder back; None on systems and file systems that know no locks.

    Raises:
        BlockingIOError: another process holds it.
        FileNotFoundError: it is gone.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor
