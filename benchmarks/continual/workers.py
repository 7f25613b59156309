"""Runs jobs in processes that share the GPUs of a machine: a small model leaves most of one idle."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from typing import Any

import torch

from .learner import Plan
from .results import job_of
from .run import Job, Row, Source, perform, task_names

SPARE = 1.2  # times what a run of its method took at the longest, by task, has to be left for another to be started


class Workers:
    """A pool of so many processes; one job is run in this process, where there is one.

    Args:
        deadline: in the time of time.monotonic().
    """

    def __init__(self, number: int, source: Source, plan: Plan, deadline: float) -> None:
        self.number, self.source, self.plan, self.deadline = number, source, plan, deadline
        self.longest: dict[str, float] = {}  # by method, seconds of a task: the first runs are of fewer tasks
        self.is_late = False

    def __enter__(self) -> Workers:
        context = multiprocessing.get_context("spawn")
        turn = context.Value("i", 0)
        self.pool = ProcessPoolExecutor(self.number, context, _choose_gpu, (turn,)) if self.number > 1 else None
        return self

    def __exit__(self, *error: Any) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def run(self, jobs: Callable[[], Iterable[Job]]) -> Iterator[Row]:
        """Rows as they are made. `jobs` is asked again after every row, as results make further jobs possible."""
        running: dict[Future[Row], Job] = {}
        while True:
            for job in self._startable(jobs(), set(running.values())):
                if self.pool is None:
                    yield self._timed(attempt(job, self.source, self.plan))
                    break
                running[self.pool.submit(attempt, job, self.source, self.plan)] = job
            else:
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    yield self._timed(future.result())

    def _startable(self, jobs: Iterable[Job], running: set[Job]) -> Iterator[Job]:
        """The jobs for which a process is free and time is left."""
        free = self.number - len(running)
        for job in jobs:
            if not free:
                return
            if job in running:
                continue
            if time.monotonic() + SPARE * self._seconds(job) > self.deadline:
                self.is_late = True
                continue
            free -= 1
            yield job

    def _seconds(self, job: Job) -> float:
        """What a run may take: where its method has not run, as long as any other."""
        a_task = self.longest.get(job.method, max(self.longest.values(), default=0.0))
        return a_task * len(task_names(job))

    def _timed(self, row: Row) -> Row:
        a_task = row["wall"] / len(task_names(job_of(row)))
        self.longest[row["method"]] = max(self.longest.get(row["method"], 0.0), a_task)
        return row


def attempt(job: Job, source: Source, plan: Plan) -> Row:
    """A run's row; where it fails, one that says why, so that the others go on."""
    started = time.monotonic()
    try:
        return perform(job, source, plan)
    except Exception as error:
        traceback.print_exc()
        row = {**asdict(job), "steps": plan.steps, "rows": plan.rows, "rank": plan.rank}
        return row | {"error": f"{type(error).__name__}: {error}"[:300], "wall": round(time.monotonic() - started, 3)}


def _choose_gpu(turn: Any) -> None:
    """Give the processes the GPUs that this one sees in turn."""
    with turn.get_lock():
        number, turn.value = turn.value, turn.value + 1
    if count := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % count]
    torch.set_num_threads(1)
