"""The sweep: every method at several learning rates on validation data, then the best with several seeds on test data.

Results are appended to a file of JSON lines as they are made. What the file holds is not run again, so a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .experiment import Bench, Plan, Trained
from .methods import method_of
from .scoring import Score

MAX_EXTENSIONS = 4
Row = dict[str, Any]


class OutOfBudgetError(Exception):
    """The next run would not end in time."""


class DeviceLostError(Exception):
    """CUDA failed in a way that only a new process recovers from."""


@dataclass
class Rows:
    """The results so far, of one suite and number of steps.

    Args:
        origin: what new rows say of the code and the machine: commit, hardware.
        retry: forget the failures that the file holds, so that they are run again.
    """

    path: Path
    plan: Plan
    origin: dict[str, str]
    retry: bool = False
    found: dict[tuple, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for row in read_rows([self.path]) if self.path.exists() else ():
            wanted = {"suite": self.plan.suite, "steps": self.plan.steps, "rows": self.plan.rows}
            if all(row.get(name) == value for name, value in wanted.items()) and not (self.retry and "error" in row):
                self.found[self._key(row)] = row

    @staticmethod
    def _key(row: Row) -> tuple:
        return row["method"], row["split"], float(row["lr"]), row["seed"]

    def get(self, method: str, split: str, lr: float, seed: int) -> Row | None:
        """What was measured already; None if it was not."""
        return self.found.get((method, split, float(lr), seed))

    def add(self, method: str, split: str, lr: float, seed: int, **values: Any) -> Row:
        """Append a row; one write, so that several processes may append to one file."""
        row = {"suite": self.plan.suite, "method": method, "split": split, "lr": lr, "seed": seed}
        row |= {"steps": self.plan.steps, "rows": self.plan.rows, **self.origin, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.found[self._key(row)] = row
        loss = row.get("error") or f"{row['loss']:.4f} ({row['seconds']:.1f} s of steps, {row['wall']:.1f} s in all)"
        print(f"{row['suite']} {method} lr={lr:g} seed={seed} {split}: {loss}", flush=True)
        return row

    def best_rate(self, method: str) -> float | None:
        """The learning rate with the lowest validation loss for seed 0; None where there is none."""
        losses = {
            lr: loss_of(row)
            for (name, split, lr, seed), row in self.found.items()
            if (name, split, seed) == (method, "validation", 0)
        }
        best = min(losses, key=lambda lr: losses[lr], default=None)
        return best if best is not None and math.isfinite(losses[best]) else None


def read_rows(paths: Sequence[Path]) -> Iterator[Row]:
    """Rows of several files; a line that was cut off is skipped."""
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def loss_of(row: Row) -> float:
    """The row's mean loss; infinite where the run failed or diverged."""
    loss = row.get("loss")
    return loss if isinstance(loss, float) and math.isfinite(loss) else math.inf


@dataclass
class Sweep:
    """Runs methods within a budget.

    Args:
        seeds: how many, from 0.
        test: whether test data are looked at.
        deadline: in the time of time.monotonic().
        rates: the only learning rates to try, beside those that the rows hold; None: each method's own, and beyond.
        worst: seconds that the longest run so far took.
    """

    bench: Bench
    rows: Rows
    seeds: int
    test: bool
    deadline: float
    rates: Sequence[float] | None = None
    worst: float = 0.0

    def run(self, name: str) -> None:
        """Sweep a method's learning rates, extend the grid while its end is best, then run the best with all seeds.

        Raises:
            OutOfBudgetError: no time is left.
            DeviceLostError: this process can compute no more; what is missing has to be run in another.
        """
        if method_of(name).kind in ("xlora", "arrow"):
            self.bench.oracle_rate = self.rows.best_rate("oracle")
            if self.bench.oracle_rate is None:
                print(f"{name} stands on the oracle's experts: run the method `oracle` first", flush=True)
                return
        best = self._sweep(name)
        rate = self.rows.best_rate(name)
        if rate is None:
            return
        for seed in range(1 if method_of(name).kind == "frozen" else self.seeds):
            trained = best[1] if best is not None and (rate, seed) == (best[0], 0) else None
            if self.rows.get(name, "validation", rate, seed) is None:
                trained = self._measure(name, rate, seed)
            if self.test and self.rows.get(name, "test", rate, seed) is None:
                self._test(name, rate, seed, trained)

    def _sweep(self, name: str) -> tuple[float, Trained] | None:
        """The best rate and its model, if it was trained here."""
        method = method_of(name)
        has_one = len(method.rates) == 1
        is_fixed = self.rates is not None or has_one
        rates = sorted(method.rates if self.rates is None or has_one else self.rates)
        best: tuple[float, Trained] | None = None
        todo = list(rates)
        extensions = 0
        while todo:
            lr = todo.pop(0)
            if self.rows.get(name, "validation", lr, 0) is None:
                trained = self._measure(name, lr, 0)
                if trained is not None and lr == self.rows.best_rate(name):
                    best = (lr, trained)
            if todo or is_fixed or extensions == MAX_EXTENSIONS:
                continue
            end = self.rows.best_rate(name)
            if end in (rates[0], rates[-1]):
                extensions += 1
                todo = [rates[0] / 2] if end == rates[0] else [rates[-1] * 2]
                rates = sorted([*rates, *todo])
        return best

    def _measure(self, name: str, lr: float, seed: int) -> Trained | None:
        """Train, and evaluate on validation data; a failure becomes a row."""
        started = self._start()
        try:
            trained = self.bench.train(name, lr, seed)
            self._record(name, "validation", lr, seed, trained, started)
            return trained
        except Exception as error:  # one method's failure must not end the others' runs
            self._record_failure(name, "validation", lr, seed, error)
            return None

    def _test(self, name: str, lr: float, seed: int, trained: Trained | None) -> None:
        started = self._start()
        try:
            trained = trained or self.bench.train(name, lr, seed)
            self._record(name, "test", lr, seed, trained, started)
        except Exception as error:
            self._record_failure(name, "test", lr, seed, error)

    def _start(self) -> float:
        now = time.monotonic()
        if now + 1.2 * self.worst > self.deadline:
            raise OutOfBudgetError
        return now

    def _record(self, name: str, split: str, lr: float, seed: int, trained: Trained, started: float) -> None:
        scores = trained.scores(split)
        wall = time.monotonic() - started
        self.worst = max(self.worst, wall)
        run = trained.run
        self.rows.add(
            name,
            split,
            lr,
            seed,
            loss=_mean(score.loss for score in scores.values()),
            scores={domain: _rounded(score) for domain, score in scores.items()},
            seconds=round(run.seconds, 3),
            wall=round(wall, 3),
            peak_mib=round(run.peak_bytes / 2**20),
            parameters=trained.num_parameters,
            majority={name: e[split].majority() for name, e in trained.data.items() if e[split].mask is not None},
            captured=run.captured,
        )

    def _record_failure(self, name: str, split: str, lr: float, seed: int, error: Exception) -> None:
        if isinstance(error, (OutOfBudgetError, KeyboardInterrupt)):
            raise error
        traceback.print_exc()
        self.rows.add(name, split, lr, seed, error=f"{type(error).__name__}: {error}"[:300])
        if "CUDA error" in str(error) or "captur" in str(error):
            raise DeviceLostError from error


def _mean(values: Iterator[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _rounded(score: Score) -> dict[str, float]:
    return {name: round(value, 5) for name, value in asdict(score).items() if value is not None}
