"""What each method costs on a sequence's last task, alone on its machine: seconds to learn it, milliseconds a token to
decode after it.

The tasks before it are learned in a few steps: neither time asks how well. What is added to a file of JSON lines beside
the results, the table shows.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..options import make_parser
from ..timing import seconds
from .bases import load_base
from .learner import EncodedTask, Learner, Plan, Setting
from .methods import METHODS
from .options import add_options, note_origin, settled
from .run import Job, Source, tasks_of
from .scoring import write_answers
from .tasks import PUBLISHED

MODULE = "benchmarks.continual.costs"
COSTS_FILE = "costs.jsonl"
EXAMPLES = (
    "--quick",
    "--data ../shared/cl-benchmark --models /models --device cuda --bases smollm2 --repeats 5",
)
FEW = 2  # steps of the tasks before the last
NEW_TOKENS = 16


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    add_options(parser, COSTS_FILE)
    add = parser.add_argument
    add("--sequence", choices=PUBLISHED, default="order4")
    add("--repeats", type=int, default=3, help="how often methods take turns at decoding (default: 3)")
    return settled(parser, argv)


def learned(method: str, setting: Setting, plan: Plan) -> tuple[Learner, float]:
    """A method after a whole sequence, and the seconds of its last task."""
    last = len(setting.tasks) - 1
    learner = METHODS[method].make(setting)
    setting.plan = replace(plan, steps=FEW, capture=False)
    for stage in () if learner.is_joint else range(last):
        learner.learn(stage)
    setting.plan = plan
    duration = learner.learn(last)
    return learner, duration / len(setting.tasks) if learner.is_joint else duration


def decoding(learner: Learner, setting: Setting) -> Callable[[], object]:
    """What answers one question of the last task in NEW_TOKENS tokens."""
    last = len(setting.tasks) - 1
    task = setting.tasks[last]
    question = task.questions["test"][:1]
    device = setting.plan.device

    def answer() -> None:
        with learner.for_task(last):
            write_answers(learner.model, question, setting.tokenizer, task.length, device, NEW_TOKENS, NEW_TOKENS)

    return answer


def measure(base_name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each method."""
    plan = Plan(args.steps, args.rows, args.rank, args.device)
    base, tokenizer = load_base(base_name, args.models, args.device)
    tasks = [
        EncodedTask.of(task, tokenizer)
        for task in tasks_of(Job(base_name, args.sequence, "", 0.0, 0), Source(args.data, args.models))
    ]
    rows, answers = {}, {}
    for method in args.methods:
        torch.manual_seed(0)
        setting = Setting(base, tokenizer, tasks, plan, seed=0, rate=1e-3)
        learner, duration = learned(method, setting, plan)
        rows[method] = {"base": base_name, "method": method, "tasks": len(tasks), "steps": args.steps}
        rows[method] |= {"rows": args.rows, "rank": args.rank, "learning": round(duration, 4)}
        answers[method] = decoding(learner, setting)
        print(f"{base_name} {method}: {duration:.2f} s to learn the last of {len(tasks)} tasks", flush=True)
    times: dict[str, list[float]] = {method: [] for method in answers}
    for _ in range(args.repeats):
        for method, answer in answers.items():
            times[method].append(1e3 * seconds(answer, args.device, 0.0) / NEW_TOKENS)
    return [row | {"ms_a_token": round(statistics.median(times[method]), 4)} for method, row in rows.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every base."""
    args = parse(argv)
    note_origin(args, MODULE, argv)
    for base_name in args.bases:
        for row in measure(base_name, args):
            with (args.out / COSTS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row))


if __name__ == "__main__":
    main()
