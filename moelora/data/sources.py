"""Where a domain's documents come from: JSONL and text files, or anything the `datasets` library reads.

A document is a text, or a conversation (a list of {role, content}) where the domain names a `messages_field`.
"""

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import datasets
from datasets.data_files import get_data_patterns
from datasets.exceptions import DatasetGenerationError, DatasetsError

from ..console import console, printable, track_reading
from ..files.opening import NotReadableError, expand_user, open_regular, parse_json, real_path, real_path_or_hub_id
from ..recipe import DomainOptions
from ..schema import Problem, UserError, did_you_mean, shorten

JSON_LINES = {".jsonl", ".ndjson"}
NEEDS_A_FOLDER = {".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zip", ".zst"}
TEXT = {".txt", ".md", ".rst", ".py", ".html", ".tex"}
PROBLEMS_SHOWN_PER_FILE = 5
BYTES_WORTH_A_PROGRESS_BAR = 50_000_000

LIES_IN_TEXTS = "lies in {}, where `datasets` would read the files written as texts; give a folder outside it"

Report = Callable[[str], None]


def resolve_path(path: str, folder: Path) -> str:
    """Make a recipe's path absolute, unless it names something on the hub."""
    names_a_file = Path(path).suffix in JSON_LINES | NEEDS_A_FOLDER | TEXT or glob.has_magic(path)
    return str(real_path(folder / expand_user(path))) if names_a_file else real_path_or_hub_id(path, folder)


def paths_read(domains: Iterable[DomainOptions]) -> list[str]:
    """Every file and folder that domains name, files by pattern one by one; ids of the hub among them."""
    return [str(read) for path in _named(domains) for read in (_files(path) if _is_files(path) else [path])]


def folder_read_around(domains: Iterable[DomainOptions], out: Path) -> str | None:
    """The folder of texts that an output folder lies in, if `datasets` would read what is written there too."""
    around = (path for path in _named(domains) if Path(path).is_dir() and real_path(out).is_relative_to(path))
    return next((path for path in around if _is_read_whole(path)), None)


def _is_read_whole(folder: str) -> bool:
    """Whether `datasets` reads every file in a folder, not those alone whose names tell a split or that it saved."""
    try:
        return not _is_saved(folder) and ["**"] in get_data_patterns(folder).values()
    except FileNotFoundError:  # there are no data, which is told elsewhere
        return False


def _named(domains: Iterable[DomainOptions]) -> list[str]:
    return [path for domain in domains for path in (domain.path, domain.eval_path) if path is not None]


def check_domain(domain: DomainOptions, key: str) -> list[Problem]:
    """Read everything a domain names and say what is wrong with it."""
    problems = _check_path(domain, domain.path, domain.split, f"{key}.path")
    if domain.eval_path is not None:
        problems += _check_path(domain, domain.eval_path, domain.split, f"{key}.eval_path")
    if domain.eval_split is None:
        return problems
    if domain.eval_path is not None:
        problems.append(Problem(f"{key}.eval_split", domain.eval_split, "drop it: `eval_path` is set"))
    elif _is_files(domain.path):
        problems.append(Problem(f"{key}.eval_split", domain.eval_split, "only `datasets` have splits; use `eval_path`"))
    else:
        problems += _check_path(domain, domain.path, domain.eval_split, f"{key}.eval_split")
    return problems


def load_documents(domain: DomainOptions, path: str, split: str) -> datasets.Dataset:
    """All documents of one path in a single column, `document`; empty ones are left out.

    Raises:
        UserError: something cannot be read; a checked recipe raises it only if the data changed since, or for rows of
            the hub, which are not downloaded to be checked.
    """

    def fail(fix: str) -> None:
        raise UserError(f"data.{domain.name}: {path}: {fix}")

    if not _is_files(path):
        rows = _open_dataset(domain, path, split).select_columns(_field(domain))
        chosen = _usable_rows(rows, domain, fail)
        _tell_empty(domain, path, len(rows) - len(chosen))
        rows = rows if len(chosen) == len(rows) else rows.select(chosen)
        return rows.rename_column(_field(domain), "document")

    read = [document for file in _files(path) for document in _read(file, domain, fail)]
    documents = list(filter(None, read))
    _tell_empty(domain, path, len(read) - len(documents))
    try:
        return datasets.Dataset.from_dict({"document": documents})
    except (ValueError, TypeError, OverflowError, NotImplementedError) as error:  # texts always form a table
        fix = (
            f"conversations differ in their fields, or hold what no table does ({error}); give {{role, content}} alone"
        )
        raise UserError(f"data.{domain.name}: {path}: {fix}") from error


def _tell_empty(domain: DomainOptions, path: str, count: int) -> None:
    if count:
        console.print(
            f"{domain.name}: rows left out, for `{printable(_field(domain))}` is empty: {count:,} of {printable(path)}",
            soft_wrap=True,
        )


def _field(domain: DomainOptions) -> str:
    return domain.messages_field or domain.text_field


def _is_files(path: str) -> bool:
    return Path(path).is_absolute() and not Path(path).is_dir()


def _files(path: str) -> list[Path]:
    if Path(path).exists():
        return [Path(path)]
    return [file for file in map(Path, sorted(glob.glob(path, recursive=True))) if file.is_file()]


def _check_path(domain: DomainOptions, path: str, split: str, key: str) -> list[Problem]:
    if not _is_files(path):
        return _check_dataset(domain, path, split, key)
    files = _files(path)
    if not files:
        missing = "no file matches the pattern" if glob.has_magic(path) else "no such file"
        return [Problem(key, path, missing)]
    return [problem for file in files for problem in _check_file(domain, file, key)]


def _check_file(domain: DomainOptions, file: Path, key: str) -> list[Problem]:
    if file.suffix in NEEDS_A_FOLDER:
        fix = f"`{file.suffix}` files are read by `datasets`: put the file in a folder of its own and give the folder"
        return [Problem(key, str(file), fix)]
    fixes: list[str] = []
    count = sum(1 for document in _read(file, domain, fixes.append) if document)
    if count == 0 and not fixes:
        fixes.append("the file holds no text; remove it or fill it")
    return [Problem(key, str(file), fix) for fix in _few(fixes, "lines")]


def _few(fixes: list[str], what: str) -> list[str]:
    more = len(fixes) - PROBLEMS_SHOWN_PER_FILE
    return fixes if more <= 0 else [*fixes[:PROBLEMS_SHOWN_PER_FILE], f"and {more} more such {what}"]


def _read(file: Path, domain: DomainOptions, report: Report) -> Iterator[Any]:
    """Yield a file's documents, also the empty ones of a JSONL file, reporting what cannot be read."""
    try:
        opened = open_regular(file)
    except NotReadableError as error:
        report(str(error))
        return
    with opened, _shown(opened, file) as stream:
        lines = _decode(stream, report)
        if file.suffix in JSON_LINES:
            yield from _read_json_lines(lines, domain, report)
            return
        text = "".join(line for _, line in lines)
    for document in text.split(domain.separator) if domain.separator else [text]:
        if document.strip():
            yield document


def _shown(opened: BinaryIO, file: Path) -> AbstractContextManager[Any]:
    """The file as it is read, with a progress bar where that takes a while."""
    size = os.fstat(opened.fileno()).st_size
    takes_long = size >= BYTES_WORTH_A_PROGRESS_BAR
    return track_reading(opened, size, f"Reading {file.name}") if takes_long else nullcontext(opened)


def _decode(lines: Any, report: Report) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            report(f"line {number}: byte {error.object[error.start]:#04x} is not UTF-8; save the file as UTF-8 text")
            return
        if "\0" in text:
            report(f"line {number}: holds a zero byte, so it is not text; give a UTF-8 text file")
            return
        yield number, text


def _read_json_lines(lines: Iterator[tuple[int, str]], domain: DomainOptions, report: Report) -> Iterator[Any]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except NotReadableError as error:
            report(f"line {number}: {error}; write one JSON object per line")
            continue
        fix = _check_row(row, domain)
        if fix:
            report(f"line {number}: {fix}")
        else:
            yield row[_field(domain)]


def _usable_rows(rows: datasets.Dataset, domain: DomainOptions, report: Report) -> list[int]:
    """Which rows hold a document, reporting those that hold something else."""
    usable = []
    for number, value in enumerate(rows[_field(domain)]):
        if fix := _check_row({_field(domain): value}, domain):
            report(f"row {number} (the first is 0): {fix}; mend or remove it")
        elif value:
            usable.append(number)
    return usable


def _check_row(row: Any, domain: DomainOptions) -> str | None:
    if not isinstance(row, dict):
        return f"must be a JSON object, not {_as_json(row)}"
    field = _field(domain)
    if field not in row:
        return _no_such_field(domain, list(row))
    value = row[field]
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return f"`{field}` holds half a character (a lone surrogate); remove it"
    if domain.messages_field is None:
        return None if isinstance(value, str) else f"`{field}` must be text, not {_as_json(value)}"
    keys = ("role", "content")
    good = isinstance(value, list) and all(
        isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in keys) for turn in value
    )
    return None if good else f"`{field}` must be a list of {{role, content}}, not {_as_json(value)}"


def _as_json(value: Any) -> str:
    return shorten(json.dumps(value, default=str), 30)  # a dataset holds more than JSON does: dates, images


def _no_such_field(domain: DomainOptions, fields: list[str]) -> str:
    option = "text_field" if domain.messages_field is None else "messages_field"
    guess = did_you_mean(_field(domain), fields)
    return f"no field `{_field(domain)}`, only {', '.join(map(printable, fields)) or 'none'}; set `{option}`{guess}"


def _open_dataset(domain: DomainOptions, path: str, split: str) -> datasets.Dataset:
    if _is_saved(path):
        saved = datasets.load_from_disk(path)
        return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    return datasets.load_dataset(path, domain.subset, split=split)


def _is_odd(file: Path) -> bool:
    """Whether reading a file might never end."""
    return file.exists() and not file.is_file() and not file.is_dir()


def _is_saved(path: str) -> bool:
    """Whether `datasets` saved a folder, which then lists its own files."""
    return any((Path(path) / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _check_dataset(domain: DomainOptions, path: str, split: str, key: str) -> list[Problem]:
    rows = None
    if odd := next((file for file in Path(path).rglob("*") if _is_odd(file)), None):
        return [Problem(key, path, f"{odd} is no regular file, but a pipe or a device, which is not read; remove it")]
    try:
        if Path(path).is_dir():
            rows = _open_dataset(domain, path, split)
            fields: list[str] | None = rows.column_names
        else:
            info = datasets.load_dataset_builder(path, domain.subset).info
            fields = list(info.features) if info.features else None
            if info.splits and split not in info.splits:
                raise KeyError(split)
    except KeyError:
        return [Problem(key, path, f"no split `{split}`; set `split` or `eval_split` to one that it has")]
    except (OSError, ValueError, DatasetsError) as error:
        # This one says nothing but that there was another.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        reason = shorten(" ".join(str(cause).split()), 200)
        where = "" if Path(path).is_dir() else "no file of that name, and "
        return [Problem(key, path, f"{where}`datasets` cannot read it: {reason}")]
    if fields is not None and _field(domain) not in fields:
        return [Problem(key, path, _no_such_field(domain, fields))]
    fixes: list[str] = []
    if rows is not None:
        _usable_rows(rows, domain, fixes.append)
    return [Problem(key, path, fix) for fix in _few(fixes, "rows")]
