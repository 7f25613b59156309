"""The rows of all runs in one file of JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

from ..quality.sweep import read_rows
from .learner import Plan
from .metrics import average_performance
from .run import Job, Row

ROWS_FILE = "rows.jsonl"


def job_of(row: Row) -> Job:
    """What a row is of."""
    return Job(**{field.name: row[field.name] for field in fields(Job)})


class Results:
    """What was run under a plan.

    Args:
        path: of the file; rows of other plans in it are left alone, and what failed is tried again.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan = path, plan
        known = read_rows([path]) if path.exists() else ()
        self.rows = {job_of(row): row for row in known if self._is_of_plan(row) and "error" not in row}

    def _is_of_plan(self, row: Row) -> bool:
        return all(row.get(name) == asdict(self.plan)[name] for name in ("steps", "rows", "rank"))

    def __contains__(self, job: Job) -> bool:
        return job in self.rows

    def add(self, row: Row) -> None:
        """Append a row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows[job_of(row)] = row

    def best(self, jobs: Iterable[Job]) -> Job:
        """The job with the highest AP; one that failed counts as the worst."""

        def score(job: Job) -> float:
            row = self.rows[job]
            return -math.inf if "error" in row else average_performance(row["matrix"])

        return max(jobs, key=score)
