"""The options that every benchmark takes."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .arms import ARMS, Mixture
from .record import RESULTS, Recorder, Row, command_line


def make_parser(module: str, description: str | None, examples: Sequence[str]) -> argparse.ArgumentParser:
    """A parser whose help ends with real calls of `python -m module`."""
    calls = "\n".join(f"  python -m {module} {example}".rstrip() for example in examples)
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=f"examples:\n{calls}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Where to run and where the results go."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=["cuda", "cpu"], help=f"default here: {default}")
    parser.add_argument("--repeats", type=int, default=5, help="how often the arms take turns (default: 5)")
    parser.add_argument("--out", type=Path, help="folder to add results to (default: benchmarks/results/DEVICE-DATE)")
    parser.add_argument("--commit", help="commit to name in the results, where there is no git checkout")


def add_options(parser: argparse.ArgumentParser, arms: Sequence[str], optional: Sequence[str] = ()) -> None:
    """The output options, the mixture's and the arms', of which the optional ones run only when they are named."""
    add_output_options(parser)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16, help="of one expert (default: 16)")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--min-time", type=float, default=0.1, help="seconds that one measurement lasts at least")
    legend = "; ".join(f"{name}: {ARMS[name]}" for name in arms)
    default = [arm for arm in arms if arm not in optional]
    legend = f"{legend} (default: {' '.join(default)})"
    parser.add_argument("--arms", nargs="+", default=default, choices=list(arms), metavar="ARM", help=legend)


def mixture_of(args: argparse.Namespace) -> Mixture:
    """The mixture that the options describe."""
    return Mixture(experts=args.experts, rank=args.rank, top_k=args.top_k)


def row_of(args: argparse.Namespace, benchmark: str, case: str, tokens: int) -> Row:
    """What the rows of one comparison have in common."""
    return Row(benchmark, case, tokens, args.experts, args.rank, args.top_k, args.dtype)


def output_folder(args: argparse.Namespace) -> Path:
    """--out, or a folder named after device and date."""
    name = args.device
    if name == "cuda":
        name = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name().lower())
    return args.out or RESULTS / f"{name}-{datetime.date.today().isoformat()}"


def recorder_of(args: argparse.Namespace, module: str, arguments: Sequence[str] | None) -> Recorder:
    """A recorder for the folder that the options name."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return Recorder(output_folder(args), args.device, command_line(module, given), args.commit)
