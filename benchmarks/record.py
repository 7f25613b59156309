"""Measurements as they are made: one CSV row each, written at once, under comment lines that say on what they ran."""

from __future__ import annotations

import csv
import dataclasses
import platform
import shlex
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
CSV_NAME, TABLE_NAME = "results.csv", "results.md"


@dataclass(frozen=True)
class Row:
    """One measurement. Rows that differ in arm, repeat, metric, value and note alone are compared with each other."""

    benchmark: str
    case: str
    tokens: int  # of one call
    experts: int
    rank: int  # of one expert
    top_k: int
    dtype: str
    arm: str = ""
    metric: str = "seconds"  # of one call; kept_bytes, peak_bytes, failed; clock_mhz of the GPU under load (no arm)
    repeat: int = 0
    value: float = float("nan")
    note: str = ""  # why an arm failed


FIELDS = [field.name for field in dataclasses.fields(Row)]


class Recorder:
    """Appends rows to the CSV of a folder, so that an interrupted run loses nothing, and prints them.

    Args:
        out: the folder; made if need be, added to if it holds results.
        device: "cuda" or "cpu".
        command: what reproduces the run.
        commit: of the code, where there is no git checkout to ask.
    """

    def __init__(self, out: Path, device: str, command: str, commit: str | None = None) -> None:
        self.path = out / CSV_NAME
        out.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        with self.path.open("a", encoding="utf-8") as file:
            for line in environment(device, command, commit):
                print(line, flush=True)
                file.write(f"# {line}\n")
            if is_new:
                csv.writer(file).writerow(FIELDS)

    def add(self, row: Row, **changes: object) -> None:
        """Write one row, with these fields changed."""
        row = dataclasses.replace(row, **changes)  # type: ignore[arg-type]
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, FIELDS).writerow(dataclasses.asdict(row))
        print(f"{row.benchmark} | {row.case} | {row.arm} | {_readable(row)}", flush=True)


def _readable(row: Row) -> str:
    if row.metric == "seconds":
        return f"{row.value * 1e3:.3f} ms (repeat {row.repeat + 1})"
    if row.metric == "failed":
        return f"failed: {row.note}"
    if row.metric == "clock_mhz":
        return f"{row.value:.0f} MHz under load"
    return f"{row.metric} {row.value / 2**20:.1f} MiB"


def read(paths: Iterable[Path]) -> tuple[list[str], list[Row]]:
    """The comment lines, without repeats, and the rows of several CSV files."""
    comments: dict[str, None] = {}
    rows = []
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines()
        comments |= dict.fromkeys(line.removeprefix("# ") for line in lines if line.startswith("#"))
        rows += [_row(cells) for cells in csv.DictReader(line for line in lines if not line.startswith("#"))]
    return list(comments), rows


def _row(cells: dict[str, str]) -> Row:
    kinds = {"int": int, "float": float, "str": str}
    return Row(**{field.name: kinds[str(field.type)](cells[field.name]) for field in dataclasses.fields(Row)})


def environment(device: str, command: str, commit: str | None = None) -> list[str]:
    """Hardware with its clocks, versions, commit and command, one line each."""
    import peft
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    lines = [f"{hardware(device)}; Python {platform.python_version()}, {versions}; commit {commit or current_commit()}"]
    clocks = _output(
        "nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem,power.limit", "--format=csv,noheader"
    )
    if device == "cuda" and clocks:
        by_gpu = "; ".join(clocks.splitlines())  # of several GPUs, one line each
        lines.append(f"clocks at the start (SM, SM at most, memory, power limit): {by_gpu}")
    return [*lines, f"command: {command}"]


def clock_mhz() -> float | None:
    """The GPU's SM clock now; None where nvidia-smi does not tell."""
    first = _output("nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits").partition("\n")[0]
    return float(first) if first.isdigit() else None


def command_line(module: str, arguments: list[str]) -> str:
    """The shell command that runs a module of this package."""
    return shlex.join(["python", "-m", module, *arguments])


def hardware(device: str) -> str:
    """The name of the GPU; of the processor, and how many threads are used."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def current_commit() -> str:
    """Of the checkout this runs in, and whether it has changes."""
    commit = _output("git", "rev-parse", "--short", "HEAD")
    is_dirty = bool(_output("git", "status", "--porcelain", "--untracked-files=no"))
    return f"{commit or 'unknown'}{' with uncommitted changes' if is_dirty else ''}"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
