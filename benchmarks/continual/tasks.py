"""The field's sequences of tasks, read from a folder: `../shared/cl-benchmark`, or a checkout of cmnfriend/O-LoRA or
liangyanshuo/gainlora.

A task is a folder of its name with `train.json` and `test.json` (gainlora calls it `dev.json`), plain or gzipped:
`{"Definition": [text], "Instances": [{"input": text, "output": text or [texts]}]}`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

SPLITS = ("train", "validation", "test")
HELD_OUT = 0.1  # of a task's training rows, for choosing learning rates
SHIFTED = "+"  # "cb+1" is the task cb with every label replaced by the next one, and told so

_ORDER_4 = "mnli cb wic copa qqp boolq rte imdb yelp amazon sst2 dbpedia agnews multirc yahoo"
_ORDER_6 = "yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia agnews yahoo multirc boolq wic"
_SUPERNI_1 = (
    "task1572 task363 task1290 task181 task002 task1510 task639 task1729 task073 task1590 task748 task511 task591 "
    "task1687 task875"
)
_SHIFTED = " ".join(
    [*(f"{name}{SHIFTED}1" for name in _ORDER_4.split()), *(f"{name}{SHIFTED}2" for name in _ORDER_6.split()[:7])]
)


@dataclass(frozen=True)
class Order:
    """A sequence of tasks.

    Args:
        tasks: names of folders, or what they begin with ("task1572").
        tuned_on: the three tasks of another order on which learning rates are chosen.
    """

    tasks: tuple[str, ...]
    tuned_on: tuple[str, ...]


def _order(tasks: str, other: str) -> Order:
    return Order(tuple(tasks.split()), tuple(other.split()[:3]))


SEQUENCES = {
    "order4": _order(_ORDER_4, _ORDER_6),
    "order6": _order(_ORDER_6, _ORDER_4),
    # The other order here is the same one backwards.
    "superni1": _order(_SUPERNI_1, " ".join(reversed(_SUPERNI_1.split()))),
    # Of our own: all of the above, and label tasks again with other labels.
    "fifty": _order(f"{_ORDER_4} {_SUPERNI_1} {_SHIFTED}", _ORDER_6),
}
PUBLISHED = ("order4", "order6", "superni1")


@dataclass(frozen=True)
class Question:
    """One row: the prompt's parts, and the answers that count as right, the first of which is learned."""

    definition: str
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A task's rows by split.

    Args:
        is_generated: whether answers are texts, scored by ROUGE-L; else labels, scored by exact match.
    """

    name: str
    rows: dict[str, tuple[Question, ...]]
    is_generated: bool = False


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
        plain, _, shift = name.partition(SHIFTED)
        match = [key for key in found if key == plain or key.startswith(f"{plain}_")]
        if match:
            task = _load(found[match[0]], seed)
            tasks.append(_shifted(task, int(shift)) if shift else task)
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
    return Task(folder.name, rows, is_generated=folder.name.startswith("task"))


def _shifted(task: Task, places: int) -> Task:
    """Every label replaced by one that comes so many places after it in the alphabet; the prompt says that it is."""
    learned = (*task.rows["train"], *task.rows["validation"])
    labels = sorted({question.answers[0] for question in learned})
    becomes = {label: labels[(number + places) % len(labels)] for number, label in enumerate(labels)}

    def changed(question: Question) -> Question:
        told = f"{question.definition} Answer by code {places}.".strip()
        answer = question.answers[0]  # one that is never learned stays
        return replace(question, definition=told, answers=(becomes.get(answer, answer),))

    rows = {split: tuple(map(changed, questions)) for split, questions in task.rows.items()}
    return replace(task, name=f"{task.name}{SHIFTED}{places}", rows=rows)


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
