"""The options that the benchmark's commands share, and the note of what was run where."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..record import RESULTS, command_line, environment
from .bases import BASES
from .methods import METHODS


def add_options(parser: argparse.ArgumentParser, file: str) -> None:
    """Data, models, methods, bases, the plan, and where results go.

    Args:
        file: what is added to in the folder of results.
    """
    add = parser.add_argument
    add("--data", type=Path, help="folder that holds the tasks' folders (docs/continual.md)")
    add("--models", type=Path, help="folder with the saved models smollm2 and gemma (default: from the Hub)")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--quick", action="store_true", help="a tiny random model on made-up tasks, on the CPU: whether the code works")
    main = [name for name, method in METHODS.items() if method.is_main]
    legend = "; ".join(f"{name}: {method.about}" for name, method in METHODS.items()).replace("%", "%%")
    legend = f"{legend} (default: {' '.join(main)})"
    add("--methods", nargs="+", choices=list(METHODS), metavar="NAME", default=main, help=legend)
    bases = [name for name in BASES if name != "quick"]
    add("--bases", nargs="+", choices=bases, default=bases)
    add("--steps", type=int, default=60, help="optimizer steps of a task (default: 60)")
    add("--rows", type=int, default=16, help="rows of a batch (default: 16)")
    about = "of the LoRA whose parameters a method may train on one task (default: 16)"
    add("--rank", type=int, default=16, help=about)
    add("--out", type=Path, default=RESULTS / "continual", help=f"folder of {file}, which is added to")
    add("--commit", help="commit to name in the results, where there is no git checkout")


def settled(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options as they were given; --quick sets those that it is for."""
    args = parser.parse_args(argv)
    if args.quick:
        args.device, args.bases, args.data = "cpu", ["quick"], None
        args.steps, args.rows, args.rank = min(args.steps, 4), 4, 4
    elif args.data is None:
        parser.error("--data FOLDER is missing: where the tasks are (docs/continual.md); or --quick")
    return args


def note_origin(args: argparse.Namespace, module: str, argv: Sequence[str] | None) -> None:
    """Make the folder of results, and note there what runs on what."""
    args.out.mkdir(parents=True, exist_ok=True)
    arguments = sys.argv[1:] if argv is None else list(argv)
    origin = environment(args.device, command_line(module, arguments), args.commit)
    with (args.out / "environment.txt").open("a", encoding="utf-8") as file:
        file.write("\n".join(origin) + "\n\n")
