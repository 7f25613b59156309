"""Learn the field's tasks one after another with every method; results are added to a file, and never made twice."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence

from ..options import make_parser
from .learner import Plan
from .methods import METHODS
from .options import add_options, note_origin, settled
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
    add_options(parser, ROWS_FILE)
    add = parser.add_argument
    add("--sequences", nargs="+", choices=list(SEQUENCES), default=list(PUBLISHED))
    add("--rates", nargs="+", type=float, help="learning rates to choose from (default: each method's own)")
    about = "compare all rates on rows held out from all tasks: for choosing a recipe, which test rows may not"
    add("--held-out", action="store_true", help=about)
    add("--seeds", type=int, default=3, help="seeds for the chosen learning rate (default: 3)")
    add("--workers", type=int, default=1, help="processes, which share the GPUs (default: 1)")
    add("--budget", type=float, default=math.inf, help="seconds after which no run is started that may not end")
    add("--eager", action="store_true", help="do not capture steps in CUDA graphs")
    return settled(parser, argv)


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
    if args.held_out:
        jobs = (Job(base, sequence, method, rate, seed, "held-out") for rate in rates)
        yield from (job for job in jobs if job not in results)
        return
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
    note_origin(args, MODULE, argv)
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
