"""What each method costs on a sequence's last task, alone on its machine: seconds to learn it, milliseconds a token to
decode after it.

The tasks before it are learned in a few steps: neither time asks how well. What is added to a file of JSON lines beside
the results, the table shows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..options import make_parser
from ..record import RESULTS, command_line, environment
from ..timing import seconds
from .bases import BASES, load_base
from .learner import EncodedTask, Learner, Plan, Setting
from .methods import METHODS
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
    add = parser.add_argument
    add("--data", type=Path, help="folder that holds the tasks' folders (docs/continual.md)")
    add("--models", type=Path, help="folder with the saved models smollm2 and gemma (default: from the Hub)")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--quick", action="store_true", help="a tiny random model on made-up tasks, on the CPU: whether the code works")
    main = [name for name, method in METHODS.items() if method.is_main]
    add("--methods", nargs="+", choices=list(METHODS), metavar="NAME", default=main)
    add("--bases", nargs="+", choices=[name for name in BASES if name != "quick"], default=["smollm2"])
    add("--sequence", choices=PUBLISHED, default="order4")
    add("--steps", type=int, default=60, help="optimizer steps of the last task (default: 60)")
    add("--rows", type=int, default=16, help="rows of a batch (default: 16)")
    add("--rank", type=int, default=16, help="as of the results beside which these are (default: 16)")
    add("--repeats", type=int, default=3, help="how often methods take turns at decoding (default: 3)")
    add("--out", type=Path, default=RESULTS / "continual", help=f"folder of {COSTS_FILE}, which is added to")
    add("--commit", help="commit to name in the results, where there is no git checkout")
    args = parser.parse_args(argv)
    if args.quick:
        args.device, args.bases, args.data, args.rank, args.rows = "cpu", ["quick"], None, 4, 4
    elif args.data is None:
        parser.error("--data FOLDER is missing: where the tasks are (docs/continual.md); or --quick")
    return args


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
    args.out.mkdir(parents=True, exist_ok=True)
    arguments = sys.argv[1:] if argv is None else list(argv)
    origin = environment(args.device, command_line(MODULE, arguments), args.commit)
    with (args.out / "environment.txt").open("a", encoding="utf-8") as file:
        file.write("\n".join(origin) + "\n\n")
    for base_name in args.bases:
        for row in measure(base_name, args):
            with (args.out / COSTS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row))


if __name__ == "__main__":
    main()
