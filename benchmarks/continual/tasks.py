"""The field's sequences of tasks, read from a folder: `../shared/cl-benchmark`, or a checkout of cmnfriend/O-LoRA or
liangyanshuo/gainlora.

A task is a folder of its name with `train.json` and `test.json` (gainlora calls it `dev.json`), plain or gzipped:
`{"Definition": [text], "Instances": [{"input": text, "output": text or [texts]}]}`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SPLITS = ("train", "validation", "test")
HELD_OUT = 0.1  # of a task's training rows, for choosing learning rates

_ORDER_4 = "mnli cb wic copa qqp boolq rte imdb yelp amazon sst2 dbpedia agnews multirc yahoo"
_ORDER_6 = "yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia agnews yahoo multirc boolq wic"
_SUPERNI_1 = (
    "task1572 task363 task1290 task181 task002 task1510 task639 task1729 task073 task1590 task748 task511 task591 "
    "task1687 task875"
)


@dataclass(frozen=True)
class Order:
    """A published order of tasks.

    Args:
        tasks: names of folders, or what they begin with ("task1572").
        is_generated: whether answers are texts, scored by ROUGE-L; else labels, scored by exact match.
        tuned_on: the three tasks of another order on which learning rates are chosen.
    """

    tasks: tuple[str, ...]
    is_generated: bool
    tuned_on: tuple[str, ...]


def _sequence(order: str, is_generated: bool, other: str) -> Order:
    return Order(tuple(order.split()), is_generated, tuple(other.split()[:3]))


SEQUENCES = {
    "order4": _sequence(_ORDER_4, False, _ORDER_6),
    "order6": _sequence(_ORDER_6, False, _ORDER_4),
    # The other order here is the same one backwards.
    "superni1": _sequence(_SUPERNI_1, True, " ".join(reversed(_SUPERNI_1.split()))),
}


@dataclass(frozen=True)
class Question:
    """One row: the prompt's parts, and the answers that count as right, the first of which is learned."""

    definition: str
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A task's rows by split."""

    name: str
    rows: dict[str, tuple[Question, ...]]


def load_sequence(folder: Path, name: str, seed: int = 0) -> list[Task]:
    """The tasks of a sequence in their order; one that the folder lacks is left out, and said.

    Raises:
        SystemExit: the folder does not exist or has none of them.
    """
    return load_tasks(folder, SEQUENCES[name].tasks, seed)


def load_tasks(folder: Path, names: Sequence[str], seed: int = 0) -> list[Task]:
    """Tasks by name, in this order; see `load_sequence`."""
    if not folder.is_dir():
        raise SystemExit(f"--data {folder}: no such folder; give one that holds the tasks' folders (docs/continual.md)")
    found = {path.parent.name: path.parent for path in sorted(folder.rglob("train.json*"))}
    tasks, missing = [], []
    for name in names:
        match = [key for key in found if key == name or key.startswith(f"{name}_")]
        if match:
            tasks.append(_load(found[match[0]], seed))
        else:
            missing.append(name)
    if not tasks:
        raise SystemExit(
            f"--data {folder}: holds none of {', '.join(names)} (docs/continual.md says how it should look)"
        )
    if missing:
        print(f"not in {folder} and left out: {', '.join(missing)}", flush=True)
    return tasks


def _load(folder: Path, seed: int) -> Task:
    """A task; the rows to hold out are drawn once for all seeds of a run."""
    train = _questions(_read(folder, "train"))
    order = np.random.default_rng(seed).permutation(len(train))
    held_out = max(1, round(HELD_OUT * len(train)))
    rows = {
        "train": tuple(train[i] for i in order[held_out:]),
        "validation": tuple(train[i] for i in order[:held_out]),
        "test": tuple(_questions(_read(folder, "test", "dev"))),
    }
    return Task(folder.name, rows)


def _read(folder: Path, *names: str) -> dict[str, Any]:
    for name in names:
        for path in (folder / f"{name}.json", folder / f"{name}.json.gz"):
            if path.exists():
                data = path.read_bytes()
                return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    raise SystemExit(f"{folder} holds no {' or '.join(f'{name}.json' for name in names)}, plain or gzipped")


def _questions(content: dict[str, Any]) -> list[Question]:
    definition = " ".join(content.get("Definition") or []).strip()
    questions = []
    for row in content["Instances"]:
        answers = row["output"] if isinstance(row["output"], list) else [row["output"]]
        questions.append(Question(definition, str(row["input"]).strip(), tuple(str(each).strip() for each in answers)))
    return questions
