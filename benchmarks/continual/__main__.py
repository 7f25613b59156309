"""Learn the field's tasks one after another with every method; results are added to a file, and never made twice."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..options import make_parser
from ..record import RESULTS, command_line, environment
from .bases import BASES
from .learner import Plan
from .methods import METHODS
from .results import ROWS_FILE, Results
from .run import Job, Source
from .tasks import PUBLISHED, SEQUENCES
from .workers import Workers

MODULE = "benchmarks.continual"
EXAMPLES = (
    "--quick",
    "--data ../shared/cl-benchmark --models /models --device cuda --workers 8 --budget 480",
    "--data ../shared/cl-benchmark --models /models --device cuda --methods lora moelora --sequences order4",
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    add = parser.add_argument
    add("--data", type=Path, help="folder that holds the tasks' folders (docs/continual.md)")
    add("--models", type=Path, help="folder with the saved models smollm2 and gemma (default: from the Hub)")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--quick", action="store_true", help="a tiny random model on made-up tasks, on the CPU: whether the code works")
    main = [name for name, method in METHODS.items() if method.is_main]
    legend = "; ".join(f"{name}: {method.about}" for name, method in METHODS.items()).replace("%", "%%")
    add(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        metavar="NAME",
        default=main,
        help=f"{legend} (default: {' '.join(main)})",
    )
    add("--sequences", nargs="+", choices=list(SEQUENCES), default=list(PUBLISHED))
    bases = [name for name in BASES if name != "quick"]
    add("--bases", nargs="+", choices=bases, default=bases)
    add("--steps", type=int, default=60, help="optimizer steps of a task (default: 60)")
    add("--rows", type=int, default=16, help="rows of a batch (default: 16)")
    add(
        "--rank", type=int, default=16, help="of the LoRA whose parameters a method may train on one task (default: 16)"
    )
    add("--rates", nargs="+", type=float, help="learning rates to choose from (default: each method's own)")
    add("--seeds", type=int, default=3, help="seeds for the chosen learning rate (default: 3)")
    add("--workers", type=int, default=1, help="processes, which share the GPUs (default: 1)")
    add("--budget", type=float, default=math.inf, help="seconds after which no run is started that may not end")
    add("--eager", action="store_true", help="do not capture steps in CUDA graphs")
    add("--out", type=Path, default=RESULTS / "continual", help=f"folder of {ROWS_FILE}, which is added to")
    add("--commit", help="commit to name in the results, where there is no git checkout")
    args = parser.parse_args(argv)
    if args.quick:
        args.device, args.bases, args.data = "cpu", ["quick"], None
        args.steps, args.rows, args.rank = min(args.steps, 4), 4, 4
    elif args.data is None:
        parser.error("--data FOLDER is missing: where the tasks are (docs/continual.md); or --quick")
    return args


def jobs_of(args: argparse.Namespace, results: Results) -> Iterator[Job]:
    """What is missing and can be run now: learning rates first, then seeds with the chosen one.

    Sequences take turns: what is generated leaves a GPU idle that others can use."""
    for seed in range(args.seeds):
        for base in args.bases:
            for method in args.methods:
                for sequence in args.sequences:
                    yield from _missing(args, results, base, sequence, method, seed)


def _missing(
    args: argparse.Namespace, results: Results, base: str, sequence: str, method: str, seed: int
) -> Iterator[Job]:
    rates = args.rates or METHODS[method].rates
    if len(rates) > 1:
        trials = [Job(base, sequence, method, rate, 0, "validation") for rate in rates]
        if untried := [trial for trial in trials if trial not in results]:
            yield from untried if seed == 0 else ()
            return
        rates = [results.best(trials).rate]
    job = Job(base, sequence, method, rates[0], seed)
    if job not in results:
        yield job


def main(argv: Sequence[str] | None = None) -> None:
    """Choose each method's learning rate, run its seeds, write the tables."""
    from .table import write

    started = time.monotonic()
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    arguments = sys.argv[1:] if argv is None else list(argv)
    origin = environment(args.device, command_line(MODULE, arguments), args.commit)
    with (args.out / "environment.txt").open("a", encoding="utf-8") as file:
        file.write("\n".join(origin) + "\n\n")
    plan = Plan(args.steps, args.rows, args.rank, args.device, capture=not args.eager)
    results = Results(args.out / ROWS_FILE, plan)
    with Workers(args.workers, Source(args.data, args.models), plan, started + args.budget) as workers:
        for row in workers.run(lambda: jobs_of(args, results)):
            results.add(row)
            print(_line(row), flush=True)
        if workers.is_late:
            print("the budget is spent; run the same command again to go on", flush=True)
    print(write(args.out))


def _line(row: dict) -> str:
    what = f"{row['base']} {row['sequence']} {row['method']} lr={row['rate']:g} seed={row['seed']} {row['split']}"
    if "error" in row:
        return f"{what}: {row['error']}"
    last = row["matrix"][-1]
    return f"{what}: {sum(last) / len(last):.1f} ({sum(row['seconds']):.0f} s of steps, {row['wall']:.0f} s in all)"


if __name__ == "__main__":
    main()
