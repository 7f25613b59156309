"""What the routers did while they trained, from the log that a run keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training.record import last_checkpoint, record_of

STATE_FILE = "trainer_state.json"


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


SERIES = ("expert_load", "maturity", "entropy", "top1_probability", "dropped", "balancing_loss")


def history_of(log: Sequence[Mapping[str, Any]]) -> History | None:
    """What `MoELoraCallback` left in a Trainer's log_history; None where it was not there.

    A log may change its routers midway (adapters that came or went); the last entry's stay, as far back as they fit.
    """
    entries = [entry for entry in log if entry.get("routers")]
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
        log = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # a report on a model does not fail for want of its training log
    return log if isinstance(log, list) else []
