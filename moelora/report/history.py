"""What the routers did while they trained, from the log that a run keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.opening import read_json
from ..storage.run_record import record_of
from ..storage.trainer_checkpoints import STATE_FILE, last_checkpoint


@dataclass(frozen=True)
class History:
    """One entry per log that has routers' values.

    Attributes:
        steps: the optimizer steps.
        routers: by router name: `expert_load` and `maturity` [steps][E], `entropy`, `top1_probability`, `dropped` and
            `balancing_loss` [steps].
    """

    steps: list[int]
    routers: dict[str, dict[str, list[Any]]]


PER_EXPERT = ("expert_load", "maturity")
SERIES = (*PER_EXPERT, "entropy", "top1_probability", "dropped", "balancing_loss")


def history_of(log: Any) -> History | None:
    """What `MoELoraCallback` left in a Trainer's log_history; None where it was not there.

    A log may change its routers midway (adapters that came or went); the last entry's stay, as far back as they fit.
    """
    entries = [entry for entry in log if _is_entry(entry)] if isinstance(log, Sequence) else []
    if not entries:
        return None
    last = entries[-1]["routers"]
    sizes = {name: len(values["expert_load"]) for name, values in last.items()}
    fitting = [
        entry
        for entry in entries
        if all(len(entry["routers"].get(name, {}).get("expert_load", ())) == size for name, size in sizes.items())
    ]
    return History(
        steps=[entry["step"] for entry in fitting],
        routers={
            name or "model": {key: [entry["routers"][name][key] for entry in fitting] for key in SERIES}
            for name in last
        },
    )


def _is_entry(entry: Any) -> bool:
    """Whether a log is one of routers, in the shape that the callback gives it: logs come with strangers' folders."""
    if not isinstance(entry, Mapping) or not entry.get("routers"):
        return False
    routers = entry["routers"]
    return (
        isinstance(routers, Mapping)
        and _is_number(entry.get("step"))
        and all(isinstance(values, Mapping) and set(SERIES) <= values.keys() for values in routers.values())
        and all(_is_series(key, values[key]) for values in routers.values() for key in SERIES)
    )


def _is_series(key: str, value: Any) -> bool:
    """One number, or a number for each expert; null stands for what is not finite."""
    if key in PER_EXPERT:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_number_or_null, value))
    return _is_number_or_null(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_number_or_null(value: Any) -> bool:
    return value is None or _is_number(value)


def read_history(folder: Path) -> History | None:
    """The history of the run that an adapter's folder belongs to: run.json, else the Trainer's own state."""
    record = record_of(folder)
    if record and record.get("log"):
        return history_of(record["log"])
    for state in (folder, last_checkpoint(folder)):
        if state is not None and (state / STATE_FILE).is_file():
            return history_of(_log_history(state / STATE_FILE))
    return None


def _log_history(path: Path) -> list[dict[str, Any]]:
    try:
        return read_json(path)["log_history"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # a report on a model does not fail for want of its training log
