"""What every operation on experts does alike: check first, show the plan, write a whole folder or nothing, undo.

An operation is a function of its options (a dataclass derived from `options.OperationOptions`):

1. `check_output` and `read_source` refuse what cannot work, before anything is loaded.
2. It describes its outcome as a [`Plan`].
3. `carry_out` prints the plan and, unless it is a dry run, lets the work fill a temporary folder that takes its place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Group, RenderableType

from ..console import make_stdout, make_table, printable
from ..data.sources import LIES_IN_TEXTS, folder_read_around, paths_read
from ..files.atomic_save import flush
from ..files.opening import expand_user, real_path
from ..files.staging import holds_something, kept_numbers, kept_place, next_kept_place, only_process_in, staging
from ..recipe import DomainOptions, ModelOptions
from ..schema import Problem, UserError, refuse
from ..storage.finding import find_base, load_mixture
from ..storage.mixture_files import WEIGHTS_FILE, StoredAdapter, check_fit, read_mixture
from ..storage.run_record import (
    LEARNED_BEFORE,
    OPERATION_FILE,
    environment,
    learned_domains,
    may_write,
    now,
    write_json,
)
from .option_fields import check_options, whole_path
from .options import OperationOptions, UndoOptions


@dataclass(frozen=True)
class Plan:
    """What an operation will have done: a title, a table, and sentences about what the table cannot say."""

    title: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [printable(self.title)]
        if self.rows:
            parts.append(make_table(None, self.columns, (), self.rows))
        return Group(*parts, *map(printable, self.notes))


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_output(options: OperationOptions, more: Sequence[Problem] = ()) -> None:
    """Refuse options out of range, a folder that may not be written, and what more is wrong, before any work."""
    refuse([*check_options(options), *more, *_check_folder(options.out_folder, options.overwrite)])


def _check_folder(folder: Path, overwrite: bool) -> list[Problem]:
    try:
        folder.exists()
    except OSError as error:  # a name that is too long
        return [Problem("--out", str(folder), f"{error.strerror}; give another place")]
    if not may_write(folder.parent):
        parent = next(parent for parent in folder.parents if os.path.lexists(parent))
        return [Problem("--out", str(folder), f"{parent} is no folder that may be written to; give another place")]
    if folder.exists() and not folder.is_dir():
        return [Problem("--out", str(folder), "is a file; give a folder")]
    if os.path.ismount(folder):
        return [
            Problem("--out", str(folder), "is a mount point, which nothing can take the place of; give a folder in it")
        ]
    if holds_something(folder) and not overwrite:
        fix = "exists; give another folder, or --overwrite to replace it (the old one is kept beside it)"
        return [Problem("--out", str(folder), fix)]
    return []


def check_only_read(
    options: OperationOptions,
    inputs: Sequence[str | Path],
    base: ModelOptions | None = None,
    domains: Sequence[DomainOptions] = (),
) -> None:
    """Refuse a folder that is or holds what is read, which would be put aside with it, or lies among texts.

    Where the options say `in_place`, the folder may be that of an input, an adapter.
    """
    replaced = _entry(options.out_folder)
    others = [*paths_read(domains), *([] if base is None else [base.name])]
    for path in [*inputs, *others]:
        if not expand_user(path).exists():  # an id of the hub
            continue
        read = {_entry(path), real_path(whole_path(path))}
        if any(replaced in place.parents for place in read):
            fix = f"holds {path}, which is only read, and would be put aside with all else in it; give another folder"
        elif replaced in read and (path in others or not options.in_place):
            fix = f"is {path}, which is only read, and would be put aside; give another folder"
        else:
            continue
        raise UserError(str(Problem("--out", str(options.out_folder), fix)))
    if around := folder_read_around(domains, options.out_folder):
        raise UserError(str(Problem("--out", str(options.out_folder), LIES_IN_TEXTS.format(around))))


def _entry(folder: str | Path) -> Path:
    """What a rename of the folder moves: links on the way to it followed, not one that it is itself."""
    path = whole_path(folder)
    return real_path(path.parent) / path.name


@dataclass(frozen=True)
class Source:
    """An adapter on disk that an operation starts from, and the base model that it fits.

    files tells its files from others of their names, which somebody may put there while this one is read.
    """

    folder: Path
    stored: list[StoredAdapter]
    base: ModelOptions
    files: frozenset[tuple[str, int, int, int]]

    @property
    def experts(self) -> list[str]:
        """[E] the adapter of every expert of the mixture, in order."""
        active = (adapter for adapter in self.stored if adapter.position is not None)
        return [adapter.name for adapter in active for _ in range(adapter.num_experts)]

    def highest_rank(self, experts: Sequence[str], by_entry: bool = False) -> int:
        """Of what is made of experts, in any linear; with a higher one it would be filled up with zeros.

        Args:
            experts: [n] the adapter of each of them.
            by_entry: whether entries of their products are changed, so that only the linears limit the rank.
        """
        ranks: Counter[str] = Counter()
        sizes: dict[str, int] = {}
        pools = {adapter.name: adapter.pools for adapter in self.stored}
        for linear, pool in (item for name in experts for item in pools[name].items()):
            ranks[linear] += pool.rank
            sizes[linear] = min(pool.lora_B.shape[0], pool.lora_A.shape[1])
        return max(size if by_entry else min(size, ranks[linear]) for linear, size in sizes.items())

    def load(self) -> PeftModel:
        """The base model with the adapter, in evaluation mode; on the GPU if there is one.

        Raises:
            UserError: it does not load, or another process has replaced it since it was checked.
        """
        try:
            return load_mixture(self.base, self.folder)
        finally:
            if _files_of(self.folder) != self.files:  # what was checked is not what was loaded
                fix = "another process has replaced or changed it while it was read; run the command again"
                raise UserError(f"the adapter {self.folder}: {fix}")


def check_rank(flag: str, rank: int, highest: int) -> None:
    """Raise UserError for a rank that would be made up with zeros."""
    if rank > highest:
        fix = f"exceeds {highest}, the highest rank that the result has in any linear; lower it, the rest is zero"
        raise UserError(str(Problem(flag, rank, fix)))


def read_source(folder: str | Path, base: str | None = None) -> Source:
    """Read an adapter's files and compare them with its base model, whose weights are not loaded for that."""
    path = expand_user(folder)
    files = _files_of(path)
    stored = read_mixture(path)
    model = find_base(path, base)
    check_fit(stored, model, path)
    return Source(path, stored, model, files)


def _files_of(folder: Path) -> frozenset[tuple[str, int, int, int]]:
    """Name, number, time and size of every file that belongs to an adapter; checkpoints beside it are others."""
    others = (path for path in folder.glob("*/adapter_*") if not path.parent.name.startswith("checkpoint-"))
    states = []
    for path in (*folder.glob("adapter_*"), *others):
        with suppress(OSError):  # it has just gone
            state = path.stat()
            states.append((str(path), state.st_ino, state.st_mtime_ns, state.st_size))
    return frozenset(states)


# ---- work ------------------------------------------------------------------------------------------------------------


def carry_out(
    options: OperationOptions,
    plan: Plan,
    work: Callable[[Path], dict[str, Any] | None],
    *,
    inputs: Sequence[str | Path] = (),
    base: ModelOptions | None = None,
) -> Path | None:
    """Print the plan; unless this is a dry run, do the work and put its folder in place, whole or not at all.

    Args:
        work: fills the folder it is given; what it returns is kept in operation.json under "outcome".
        inputs: adapters that were read, noted in operation.json with a checksum of their weights.
        base: the base model, noted so that later commands find it.

    Returns:
        The folder; None after a dry run.

    Raises:
        UserError: the folder is or holds what was read, or somebody else has written to it meanwhile.
    """
    stdout = make_stdout()
    check_only_read(options, inputs, base)
    stdout.print(plan, soft_wrap=True)
    out = options.out_folder
    if options.dry_run:
        stdout.print(nothing_written(out), soft_wrap=True)
        return None
    record = describe_operation(options, inputs, base)
    with replacing_folder(out, options.overwrite) as (place, backup):
        outcome = work(place)
        write_json(place / OPERATION_FILE, record | {"outcome": outcome, "finished": now()})
    if backup is not None:
        undo = printable(shlex.join(["moelora", "undo", shown(out)]))
        stdout.print(f"Kept what was there in {printable(shown(backup))}; to bring it back: {undo}", soft_wrap=True)
    stdout.print(f"Written: {printable(shown(out))}", soft_wrap=True)
    return out


def nothing_written(out: Path) -> str:
    """What a dry run ends with; out is where the result would go."""
    kept = (
        f"; what it holds would be kept in {printable(shown(next_kept_place(out, 'backup')))}"
        if holds_something(out)
        else ""
    )
    return f"Dry run: nothing was written to {printable(shown(out))}{kept}."


def shown(path: Path) -> str:
    """A place as messages name it: from the folder one works in, where it lies below that."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def describe_operation(
    options: Any, inputs: Sequence[str | Path] = (), base: ModelOptions | None = None
) -> dict[str, Any]:
    """What operation.json says of an operation that begins."""
    return {
        "operation": type(options).__name__.removesuffix("Options").lower(),
        "options": dataclasses.asdict(options),
        "inputs": {str(path): _checksum(expand_user(path) / WEIGHTS_FILE) for path in inputs},
        "base": None if base is None else dataclasses.asdict(base),
        LEARNED_BEFORE: [domain for path in inputs for domain in learned_domains(expand_user(path))],
        "environment": environment(),
        "started": now(),
    }


def _checksum(path: Path) -> str | None:
    """SHA-256 of a file; None where there is none, as for what came from the hub."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def replacing_folder(folder: Path, overwrite: bool) -> Iterator[tuple[Path, Path | None]]:
    """A temporary folder that becomes `folder` once the block has succeeded, and where the old one will be kept.

    Renames only: at every moment there is the old folder or the new one under its name or, between two renames, the old
    one under the name of its backup.
    """
    backup = next_kept_place(folder, "backup") if overwrite and holds_something(folder) else None
    with staging(folder) as place:
        place.mkdir()
        yield place, backup
        _flush(place)
        try:
            if backup is not None:
                os.rename(folder, backup)
            os.rename(place, folder)
        except OSError as error:
            raise UserError(
                f"{folder}: another process has written to it meanwhile ({error.strerror}); that is kept, and nothing "
                "of this run; give another folder"
            ) from error
        flush(folder.parent)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        flush(path)


# ---- undo ------------------------------------------------------------------------------------------------------------


def undo(options: UndoOptions) -> Path | None:
    """Put the newest backup of a folder in its place; what was there is kept as `NAME.undone-N`, nothing is deleted."""
    folder = whole_path(options.folder)
    numbers = kept_numbers(folder, "backup")
    if not numbers:
        raise UserError(
            f"{folder}: nothing to undo: there is no {folder.name}.backup-N beside it. An operation that wrote a new "
            "folder replaced nothing; remove the folder if you do not want it"
        )
    backup, undone = kept_place(folder, "backup", max(numbers)), next_kept_place(folder, "undone")
    stdout = make_stdout()
    moves = [(folder, undone)] if folder.exists() else []
    with ExitStack() as stack:
        if folder.is_dir():
            try:
                stack.enter_context(only_process_in(folder))
            except BlockingIOError:
                raise UserError(f"{folder}: a process is training into it; wait for it, or stop it") from None
        for source, target in [*moves, (backup, folder)]:
            stdout.print(f"{printable(shown(source))} -> {printable(shown(target))}", soft_wrap=True)
            if not options.dry_run:
                os.rename(source, target)
    if options.dry_run:
        stdout.print("Dry run: nothing was changed.")
    return None if options.dry_run else folder
