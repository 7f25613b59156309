"""The `moelora` command: thin subcommands over `moelora.training` and `moelora.report`."""

import argparse
import sys
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from .experts.auto_growth import AutoGrowth
from .experts.building import BuildOptions, build_command
from .experts.continual import Growth, load_growing
from .experts.distil_command import DistilOptions, distil_command
from .experts.export_command import ExportOptions, export
from .experts.merge_command import MergeOptions, merge_command
from .experts.novelty_command import NoveltyOptions, novelty_command
from .experts.operation import UndoOptions, undo
from .experts.prune import PruneOptions, prune_command
from .report.command import ReportOptions, report
from .report.inspection import InspectOptions, inspect
from .training import UserError, load_recipe, train
from .training.generate import GenerateOptions, generate
from .training.progress import is_main_process
from .training.schema import about, is_required, settable_fields, type_hints
from .training.summary import summary


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Fine-tune a causal language model with a mixture of LoRA experts, as a recipe says."""

    recipe: str = field(
        metadata=about("the recipe, a YAML file; docs/training.md lists what it may say", positional=True)
    )
    set: list[str] = field(
        default_factory=list,
        metadata=about("replace a setting of the recipe, as if written there; may be repeated", metavar="KEY=VALUE"),
    )
    resume: bool = field(
        default=False, metadata=about("continue from the last checkpoint in the recipe's output folder")
    )
    overwrite: bool = field(default=False, metadata=about("replace the run that the recipe's output folder holds"))
    grow: str | None = field(
        default=None,
        metadata=about(
            "folder of a trained mixture, to which new experts for the recipe's data are added; it is only read. "
            "`auto`: add them only if the data are new to the mixture that --adapter names, else train its own experts"
        ),
    )
    adapter: str | None = field(default=None, metadata=about("with --grow auto: folder of the trained mixture"))
    dry_run: bool = field(default=False, metadata=about("with --grow: print what would be done and write nothing"))


def train_command(options: TrainOptions) -> None:
    """Train, then print the tables and where the adapter is."""
    if options.resume and options.overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one of them")
    if (options.adapter is not None) != (options.grow == "auto"):
        raise UserError("--grow auto and --adapter FOLDER belong together; to add experts in any case: --grow FOLDER")
    if options.dry_run and options.grow is None:
        raise UserError("--dry-run needs --grow; without it nothing is there that a run could change")
    stdout = Console(highlight=False, quiet=not is_main_process)
    resume, overwrite = options.resume, options.overwrite
    if options.grow is None:
        start, recipe = None, load_recipe(options.recipe, options.set, resume=resume, overwrite=overwrite)
    else:
        kind, folder = (AutoGrowth, options.adapter) if options.adapter else (Growth, options.grow)
        start, recipe = load_growing(options.recipe, folder, options.set, resume=resume, overwrite=overwrite, kind=kind)
        stdout.print(start.plan(recipe), soft_wrap=True)
    if options.dry_run:
        stdout.print("Dry run: nothing was written.")
        return
    record = train(recipe, resume=resume, overwrite=overwrite, start=start)
    stdout.print(summary(record))
    stdout.print(f"Adapter and run.json: {recipe.output_dir}", soft_wrap=True)


COMMANDS: dict[str, tuple[type, Callable[[Any], object], str]] = {
    "train": (
        TrainOptions,
        train_command,
        "moelora train examples/quickstart.yaml --set training.max_steps=20",
    ),
    "generate": (
        GenerateOptions,
        generate,
        'moelora generate --adapter runs/quickstart/adapter --prompt "def read_lines(path):"',
    ),
    "inspect": (InspectOptions, inspect, "moelora inspect runs/quickstart/adapter"),
    "report": (
        ReportOptions,
        report,
        "moelora report --adapter runs/quickstart/adapter --data code=runs/quickstart/data/code.jsonl --out code.html",
    ),
    "build": (
        BuildOptions,
        build_command,
        "moelora build --expert code=loras/code --expert docs=loras/docs --router arrow --out loras/mixture",
    ),
    "export": (
        ExportOptions,
        export,
        "moelora export runs/quickstart/adapter --expert 0 --out loras/expert-0",
    ),
    "novelty": (
        NoveltyOptions,
        novelty_command,
        "moelora novelty runs/quickstart/adapter --calibration code=runs/quickstart/data/code.jsonl "
        "--data mail=mail.jsonl",
    ),
    "prune": (
        PruneOptions,
        prune_command,
        "moelora prune runs/quickstart/adapter --keep 3 --by worth --data code=runs/quickstart/data/code.jsonl "
        "--out runs/quickstart/pruned",
    ),
    "merge": (
        MergeOptions,
        merge_command,
        "moelora merge runs/quickstart/adapter --experts 0,1 --data code=runs/quickstart/data/code.jsonl "
        "--out runs/quickstart/merged",
    ),
    "distil": (
        DistilOptions,
        distil_command,
        "moelora distil runs/quickstart/adapter --r 16 --data code=runs/quickstart/data/code.jsonl "
        "--out runs/quickstart/lora",
    ),
    "undo": (UndoOptions, undo, "moelora undo runs/quickstart/smaller"),
}
"""Subcommand: the dataclass of its options, the function it calls, a call to paste."""


def build_parser() -> argparse.ArgumentParser:
    """The command line, with types, defaults and help taken from the options' dataclasses."""
    parser = argparse.ArgumentParser(
        prog="moelora",
        description="Mixture-of-LoRA-experts fine-tuning.",
        epilog=_examples(example for _, _, example in COMMANDS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (options, _, example) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=options.__doc__,
            description=options.__doc__,
            epilog=_examples([example]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_options(subparser, options)
    return parser


def _examples(calls: typing.Iterable[str]) -> str:
    return "\n".join(["example:", *(f"  {call}" for call in calls)])


def _add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    hints = type_hints(cls)
    for name, spec in settable_fields(cls).items():
        help_text = spec.metadata["help"]
        if spec.metadata.get("positional"):
            parser.add_argument(name, metavar=name.upper(), help=help_text)
            continue
        flag = f"--{name.replace('_', '-')}"
        if hints[name] is bool:
            parser.add_argument(flag, action="store_true", help=help_text)
        elif hints[name] == list[str]:
            parser.add_argument(flag, action="append", default=[], metavar=spec.metadata["metavar"], help=help_text)
        else:
            required = is_required(spec)
            shown = "" if required or spec.default is None else f" (default: {spec.default})"
            default = None if required else spec.default
            kind = _value_type(hints[name])
            parser.add_argument(flag, type=kind, required=required, default=default, help=help_text + shown)


def _value_type(hint: Any) -> type:
    """The type of an option's value: `str` of `str | None`."""
    return next(kind for kind in (typing.get_args(hint) or (hint,)) if kind is not types.NoneType)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status is 2 for a mistake that the user can fix, told without a traceback."""
    parsed = vars(build_parser().parse_args(arguments))
    name = parsed.pop("command")
    options, command, _ = COMMANDS[name]
    # PEFT 0.21 reads a property that transformers 5.23 renamed: nothing that the user of a command could change.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    try:
        command(options(**parsed))
    except UserError as error:
        print(f"moelora: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; --resume continues from the last checkpoint" if name == "train" else ""
        print(f"moelora: stopped{hint}", file=sys.stderr)
        return 130
    return 0
