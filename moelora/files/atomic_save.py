"""Saves that take effect at once: the files of one carry one id, and its configuration their checksums.

The files that PEFT names (adapter_config.json, adapter_model.safetensors) cannot be replaced in one step. So a new
save is first written out of sight, then moved into the adapter's folder as a folder of its own by one rename,
which is the moment it takes effect, and then file by file to where PEFT looks. Whoever is killed in between leaves that
folder, `.moelora-save`: readers take each file from there if it has not been moved, and the next save finishes the job.
A reader beside a writer reads again where a file was replaced meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

import torch
import xxhash
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor

from .opening import read_json

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

ROUTER_NAME = "router.safetensors"
PICKLED_ROUTER_NAME = "router.pt"
"""An attached router as it was saved until November 2026: a pickle, which runs code when it is loaded."""
CARD_NAME = "README.md"
ID_KEY = "moelora_save"
"""Under which the metadata of a safetensors file hold the id of its save."""
PENDING = ".moelora-save"
LOCK = ".moelora-save.lock"

DATA_NAMES = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, ROUTER_NAME, PICKLED_ROUTER_NAME)
"""Files that belong to one save alone, which its configuration lists."""
_NAMES = (*DATA_NAMES, CARD_NAME, CONFIG_NAME)
"""Every file that a save may write or remove, in the order in which they are put in place."""
_READ_AGAIN = 50


class SaveError(ValueError):
    """The files of an adapter do not belong together."""


def new_id() -> str:
    """An id that no other save has."""
    return token_hex(8)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """XXH3 of tensors, their names, dtypes and shapes: as quick as memory is read.

    It tells damage and mix-ups, and is no protection against somebody who wants to deceive.
    """
    summed = xxhash.xxh3_64()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        summed.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        summed.update(tensor.flatten().view(torch.uint8).numpy().data)
    return f"xxh3:{summed.hexdigest()}"


# ---- writing ---------------------------------------------------------------------------------------------------------


def put_in_place(written: Path, folder: Path) -> None:
    """Let a folder of written files become the save that the adapter's folder holds; other files there stay."""
    for path in written.iterdir():
        flush(path)
    flush(written)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # another process has just made it
            os.rename(written, folder)
            flush(folder.parent)
            return
    folder.mkdir(exist_ok=True)
    with _only_writer_in(folder):
        _finish(folder)
        os.rename(written, folder / PENDING)
        flush(folder)
        _finish(folder)


@contextlib.contextmanager
def _only_writer_in(folder: Path) -> Iterator[None]:
    """Wait until no other process or thread puts files in place here. Whoever trains may hold the folder itself."""
    # A rename is one step, putting a save in place is several: of two that finish one save at once, the slower would
    # take away what the quicker has since put there of the next.
    path = folder / LOCK
    descriptor = _locked(path)
    with contextlib.ExitStack() as stack:
        if descriptor is not None:
            stack.callback(os.close, descriptor)
            stack.callback(path.unlink, missing_ok=True)  # first, or another takes a lock that nobody finds
        yield


def _locked(path: Path) -> int | None:
    """A descriptor whose closing gives the lock back; None on systems and file systems that know no locks."""
    while fcntl is not None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _identity(path) == _identity_of(os.fstat(descriptor)):
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            return None
        os.close(descriptor)  # the one that held it has removed it
    return None


def _finish(folder: Path) -> None:
    """Put the files of a save whose moment has come in their places, and remove those of the save before."""
    pending = folder / PENDING
    if pending.is_symlink() or pending.is_file():  # of a stranger's folder: what it leads to is not ours to move
        pending.unlink(missing_ok=True)
    if not pending.is_dir():
        return
    kept = _kept(pending)
    if kept is not None:
        for name in DATA_NAMES:
            if name not in kept:
                (folder / name).unlink(missing_ok=True)
    for name in _NAMES:  # the configuration last: it says which others belong to it
        if not (pending / name).is_file():  # not in this save, or a stranger's folder or pipe
            continue
        with contextlib.suppress(FileNotFoundError):  # moved by another process
            os.replace(pending / name, folder / name)
    shutil.rmtree(pending, ignore_errors=True)
    flush(folder)


def _kept(pending: Path) -> list[str] | None:
    """The data files of a save that is being put in place; None where its configuration has been."""
    if not (pending / CONFIG_NAME).is_file():  # a pipe would be waited for
        return None
    try:
        record = read_json(pending / CONFIG_NAME)["checkpoint"]
        check_record(record)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return list(record["files"])


def flush(path: Path) -> None:
    """Wait until the disk has what was written to a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading ---------------------------------------------------------------------------------------------------------


def part(folder: Path, name: str) -> Path:
    """Where a file of the save in force lies, whether or not it is there."""
    pending = folder / PENDING
    if (pending / name).is_file():
        return pending / name
    kept = _kept(pending) if name in DATA_NAMES else None
    is_of_the_save_before = kept is not None and name not in kept
    return (pending if is_of_the_save_before else folder) / name


def read_at_once(folder: Path, names: Iterable[str], read: Callable[[], T]) -> T:
    """What read gives, from files that nobody replaced meanwhile.

    Raises:
        SaveError: they are replaced again and again.
        ValueError, OSError: what read raises while no one is writing.
    """
    names = tuple(names)
    for _ in range(_READ_AGAIN):
        before, error = _state(folder, names), None
        try:
            result = read()
        except (ValueError, OSError) as caught:
            error = caught
        if _state(folder, names) == before:
            if error is not None:
                raise error
            return result
        time.sleep(0.02)
    raise SaveError(f"{str(folder)!r} is being written to without a pause; read it when that has ended")


def _state(folder: Path, names: tuple[str, ...]) -> list[tuple[int, int, int] | None]:
    places = [folder / PENDING, *(place / name for place in (folder, folder / PENDING) for name in names)]
    return [_identity(place) for place in places]


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        return _identity_of(path.stat())
    except (OSError, ValueError):
        return None


def _identity_of(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns


def check_save(source: str, record: Any, found: dict[str, tuple[str | None, str]]) -> str | None:
    """Compare the parts of a save with what its configuration says of them; what to say of one that is damaged.

    Damage is left to the caller to refuse: a look into the part may say better what is wrong with it.

    Args:
        source: the adapter, for messages.
        record: the configuration's `checkpoint`; None in adapters that were saved before there was one.
        found: for each data file that is there, the id in its metadata (None: it has none) and its checksum.

    Raises:
        SaveError: a part is missing, or of another save; the message names it.
    """
    fault = None
    if record is None:
        if strange := [name for name, (save_id, _) in found.items() if save_id is not None or name == ROUTER_NAME]:
            raise SaveError(
                f"{strange[0]} in {source!r} is of a save that {CONFIG_NAME} does not know: the two were saved at "
                "different times; restore both from one copy"
            )
        return None
    files = record["files"]
    for name, expected in files.items():
        if name not in found:
            raise SaveError(f"{source!r} lacks {name}, which was saved with its {CONFIG_NAME}; restore it from a copy")
        save_id, actual = found[name]
        if save_id not in (None, record["id"]):
            raise SaveError(
                f"{name} and {CONFIG_NAME} in {source!r} are of different saves ({save_id} and {record['id']}); "
                "restore both from one copy"
            )
        if actual != expected:
            fault = (
                f"{name} in {source!r} is damaged, or not the one that was saved with its {CONFIG_NAME} ({actual}, "
                f"expected {expected}); restore it from a copy or an earlier checkpoint"
            )
    if strange := [name for name in found if name not in files]:
        raise SaveError(
            f"{strange[0]} in {source!r} was not saved with its {CONFIG_NAME}; remove it, or restore both from one copy"
        )
    return fault


def check_record(record: Any) -> None:
    """Refuse a `checkpoint` of a configuration that does not say what a save holds.

    Raises:
        ValueError: naming what is wrong with it.
    """
    files = record.get("files") if isinstance(record, dict) else None
    is_good = (
        isinstance(files, dict)
        and isinstance(record.get("id"), str)
        and all(name in DATA_NAMES and isinstance(value, str) for name, value in files.items())
        and isinstance(record.get("router", {}), dict)
    )
    if not is_good:
        raise ValueError(
            f"`checkpoint` is not what save_pretrained writes; restore {CONFIG_NAME} from a copy or save the adapter "
            "again"
        )
