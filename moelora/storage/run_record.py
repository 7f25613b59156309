"""run.json: what a run was asked, where it ran and what came out; and what an output folder may be used for."""

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME

from ..files.opening import real_path
from ..files.staging import staging
from ..recipe import Recipe
from ..schema import Problem
from .record_check import LEARNED_BEFORE, read_checked_operation, read_checked_run
from .trainer_checkpoints import has_all_steps, last_checkpoint, last_whole_checkpoint, step_of

RUN_FILE = "run.json"
OPERATION_FILE = "operation.json"
PACKAGES = ("moelora", "torch", "transformers", "peft", "datasets", "accelerate", "tokenizers", "liger-kernel")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that a crash leaves the old file or the new one, never a part of it."""
    with replacing(path) as stream:
        stream.reconfigure(errors="backslashreplace")  # half a character becomes an escape, which in JSON means itself
        json.dump(finite(content), stream, indent=2, ensure_ascii=False, default=str, allow_nan=False)
        stream.write("\n")


def finite(value: Any) -> Any:
    """The value with null in place of NaN and infinities, which JSON does not know.

    >>> finite({"loss": math.nan, "log": (1.5, math.inf)})
    {'loss': None, 'log': [1.5, None]}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIOWrapper]:
    """A stream to a temporary file that takes the place of path once the block has succeeded, and not before."""
    try:
        with staging(path) as temporary:
            with temporary.open("w", encoding="utf-8") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk, which does not say where
            error.filename = str(path)
        raise


def may_write(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made first where it is not there: found out by trying, for
    permissions say neither that /proc takes no files nor that a disk is mounted to be read only."""
    nearest = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryDirectory(prefix=".moelora.", dir=nearest):
            return True
    except OSError:
        return False


def read_record(output_dir: Path) -> dict[str, Any] | None:
    """The run.json of an output folder, or None where there is none that this package wrote or that can be read."""
    return read_checked_run(output_dir / RUN_FILE)


def record_of(adapter: Path) -> dict[str, Any] | None:
    """The run.json of the run that wrote an adapter; a checkpoint's lies one folder up.

    What an operation wrote may lie in the folder of a run too, and that run then says nothing about it.
    """
    if (record := read_record(adapter)) or _read_operation(adapter):
        return record
    return read_record(real_path(adapter).parent)


def learned_domains(adapter: Path) -> list[dict[str, Any]]:
    """Domains as recipes say them, which an adapter was trained on: by its own run first, then by those before.

    Runs and operations note the latter as LEARNED_BEFORE, for the adapters that they start from may move or go.
    """
    if record := read_record(adapter):
        return [*record["recipe"]["data"], *record.get(LEARNED_BEFORE, ())]
    operation = _read_operation(adapter)
    if LEARNED_BEFORE in operation:
        return operation[LEARNED_BEFORE]
    parent = real_path(adapter).parent
    return learned_domains(parent) if read_record(parent) else []


def _read_operation(adapter: Path) -> dict[str, Any]:
    """The operation.json of a folder; empty where there is none that can be read."""
    return read_checked_operation(adapter / OPERATION_FILE)


def noted_base(adapter: Path) -> dict[str, Any] | None:
    """The base model of an adapter as the run or the operation that wrote it noted it: the fields of `ModelOptions`.

    It knows more than PEFT's name does: the GGUF file and the precision. A checkpoint's run.json lies one folder up.
    """
    record = record_of(adapter)
    return record["recipe"]["model"] if record else _read_operation(adapter).get("base")


def check_output_dir(recipe: Recipe, *, resume: bool, overwrite: bool) -> list[Problem]:
    """Whether a run may start, or continue, in the recipe's output folder."""
    folder = recipe.output_dir
    if folder.exists() and not folder.is_dir():
        return [_folder_problem(folder, "is a file; give a folder")]
    if not may_write(folder):
        return [_folder_problem(folder, "may not be written to; give another place")]
    record, checkpoint = read_record(folder), last_checkpoint(folder)
    if resume:
        return _check_resume(recipe, record)
    if overwrite:
        return []
    replace = "give another folder, or --overwrite to replace it (the old one is kept beside it)"
    if record is None and (checkpoint or (folder / RUN_FILE).exists()):
        return [_folder_problem(folder, f"holds something else's run; {replace}")]
    if record and record["status"] == "finished":
        return [_folder_problem(folder, f"holds a finished run; {replace}")]
    if checkpoint:
        return [_folder_problem(folder, "holds an unfinished run; --resume to continue it, --overwrite to start over")]
    if (folder / CONFIG_NAME).exists():
        return [_folder_problem(folder, f"holds an adapter; {replace}")]
    return []


def _folder_problem(folder: Path, fix: str) -> Problem:
    return Problem("training.output_dir", str(folder), fix)


def _check_resume(recipe: Recipe, record: dict[str, Any] | None) -> list[Problem]:
    folder = recipe.output_dir
    checkpoint, damaged = last_whole_checkpoint(folder)
    if record is None or checkpoint is None:
        lacking = "; ".join(damaged) or "it holds no complete checkpoint"
        lacking = f"it holds no readable {RUN_FILE}" if record is None else lacking
        return [_folder_problem(folder, f"nothing to resume: {lacking}; run without --resume")]
    if record["status"] == "finished" and has_all_steps(recipe, checkpoint, record.get("steps", 0)):
        done = f"the run is finished, at step {record.get('steps', step_of(checkpoint))}"
        return [_folder_problem(folder, f"{done}; raise training.max_steps or num_train_epochs to go on from there")]
    if 0 < (max_steps := recipe.training.get("max_steps", -1)) < step_of(checkpoint):
        fix = f"{checkpoint.name} is beyond it; give {step_of(checkpoint)} to end the run there, or more to train on"
        return [Problem("training.max_steps", max_steps, fix)]
    before, after = _identity(record["recipe"]), _identity(json.loads(json.dumps(recipe.as_dict())))
    return [
        Problem(
            key,
            after.get(key),
            f"was {before.get(key)!r} when the run began; set it back, or --overwrite to start over",
        )
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _identity(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings that must not change within a run, by dotted key; folders may move and training may be extended."""
    flat = {f"mixture.{name}": value for name, value in recipe["mixture"].items()}
    for domain in recipe["data"]:
        flat |= {f"data.{domain['name']}.{name}": value for name, value in domain.items() if "path" not in name}
    plain = {name: recipe[name] for name in ("block_size", "max_eval_blocks", "seed")}
    return flat | plain | {"start_from": recipe.get("start_from", Recipe.start_from)}  # runs of before had new ones


def environment() -> dict[str, Any]:
    """Versions, source commit and hardware of this process."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": source_commit(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def source_commit() -> str | None:
    """The commit of this package's sources, with `-dirty` for local changes; None where they are not in a git tree."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        # An installed copy inside somebody else's repository is not tracked there.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "..") else "")
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
