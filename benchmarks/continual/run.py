"""One run: a method learns a sequence, and after each task answers questions of all tasks so far."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .bases import load_base
from .learner import EncodedTask, Learner, Plan, Setting
from .methods import METHODS
from .mixture import Grown
from .scoring import exact_match, rouge_l
from .tasks import SEQUENCES, Task, load_tasks

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What tells one run from another.

    Args:
        split: "test"; "validation" where a learning rate is tried on the three tasks of another order; "held-out" where
            recipes are compared on all tasks.
    """

    base: str
    sequence: str
    method: str
    rate: float
    seed: int
    split: str = "test"

    @property
    def rows(self) -> str:
        """Which of a task's rows are answered."""
        return "test" if self.split == "test" else "validation"


@dataclass(frozen=True)
class Source:
    """Where data and models are; None: the tiny ones that come with the benchmark, and the Hub."""

    data: Path | None
    models: Path | None


def task_names(job: Job) -> tuple[str, ...]:
    """Of the tasks that a run learns, in order, those that the data lack included."""
    order = SEQUENCES[job.sequence]
    return order.tuned_on if job.split == "validation" else order.tasks


def tasks_of(job: Job, source: Source) -> list[Task]:
    """The tasks that a run learns, in order."""
    if source.data is None:
        from .quick import quick_tasks

        return quick_tasks()
    return load_tasks(source.data, task_names(job))


@lru_cache(maxsize=4)
def _encoded(base: str, sequence: str, split: str, source: Source, device: str) -> list[EncodedTask]:
    tokenizer = load_base(base, source.models, device)[1]
    return [EncodedTask.of(task, tokenizer) for task in tasks_of(Job(base, sequence, "", 0, 0, split), source)]


def perform(job: Job, source: Source, plan: Plan) -> Row:
    """Run it; a row of results, with scores in percent and seconds of training by task."""
    started = time.monotonic()
    base, tokenizer = load_base(job.base, source.models, plan.device)
    tasks = _encoded(job.base, job.sequence, job.split, source, plan.device)
    torch.manual_seed(job.seed)
    setting = Setting(base, tokenizer, tasks, plan, job.seed, job.rate)
    learner = METHODS[job.method].make(setting)
    scores = Scores(setting, job.rows)
    row: Row = {**asdict(job), "steps": plan.steps, "rows": plan.rows, "rank": plan.rank}
    row |= {"tasks": [task.name for task in tasks], "matrix": [], "seconds": []}
    last = len(tasks) - 1
    for stage in [last] if learner.is_joint else range(last + 1):
        row["seconds"].append(round(learner.learn(stage), 3))
        row["matrix"].append([scores.of(learner, task, learner.for_task(task)) for task in range(stage + 1)])
    if isinstance(learner, Grown):
        row["told"] = [scores.of(learner, task, learner.told(task)) for task in range(last + 1)]
    row |= {"trainable": learner.trainable, "stored": learner.stored()}
    return row | {"wall": round(time.monotonic() - started, 3)}


@dataclass(frozen=True)
class Scores:
    """How answers of a run's tasks are scored."""

    setting: Setting
    rows: str

    def of(self, learner: Learner, number: int, told: AbstractContextManager[object]) -> float:
        """A task's score, in percent."""
        task, device = self.setting.tasks[number], self.setting.plan.device
        with told:
            if task.is_generated:
                questions = task.questions[self.rows]
                score = rouge_l(learner.model, questions, self.setting.tokenizer, task.length, device)
            else:
                score = exact_match(learner.model, task.examples[self.rows], device)
        return round(score, 2)
