"""The `moelora` command: thin subcommands over `moelora.training`, `moelora.report` and `moelora.experts`.

A command's module is imported once its options are in order: PyTorch, transformers and PEFT take seconds.
"""

import argparse
import os
import pkgutil
import sys
import types
import typing
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from ..console import OutputClosedError, make_stdout, naming_output, printable
from ..schema import UserError, is_required, refuse, settable_fields, shorten, type_hints
from .option_fields import check_options
from .options import COMMANDS, TrainOptions
from .process import (
    drop_output,
    escape_what_cannot_be_encoded,
    failed_to_write,
    flush_output,
    let_interrupts,
    printable_warnings,
    replace_closed_streams,
)

LONGEST_ERROR = 500  # characters of what argparse says; it quotes arguments as long as they are


def train_command(options: TrainOptions) -> None:
    """Train, then print the tables and where the adapter is."""
    if options.resume and options.overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one of them")
    if (options.adapter is not None) != (options.grow == "auto"):
        raise UserError("--grow auto and --adapter FOLDER belong together; to add experts in any case: --grow FOLDER")
    if options.dry_run and options.grow is None:
        raise UserError("--dry-run needs --grow; without it nothing is there that a run could change")
    if options.max_experts is not None and options.grow is None:
        raise UserError("--max-experts needs --grow; a new mixture has as many experts as the recipe's mixture says")
    from ..training import load_recipe, train
    from ..training.summary import summary
    from .auto_grow import AutoGrowth
    from .grow import Growth, load_growing
    from .operation import nothing_written

    stdout = make_stdout()
    resume, overwrite = options.resume, options.overwrite
    if options.grow is None:
        start, recipe = None, load_recipe(options.recipe, options.set, resume=resume, overwrite=overwrite)
    else:
        kind, folder = (AutoGrowth, options.adapter) if options.adapter else (Growth, options.grow)
        start, recipe = load_growing(
            options.recipe,
            folder,
            options.set,
            resume=resume,
            overwrite=overwrite,
            kind=kind,
            max_experts=options.max_experts,
        )
        stdout.print(start.plan(recipe), soft_wrap=True)
    if options.dry_run:
        stdout.print(nothing_written(recipe.output_dir), soft_wrap=True)
        return
    record = train(recipe, resume=resume, overwrite=overwrite, start=start)
    stdout.print(summary(record))
    stdout.print(f"Adapter and run.json: {printable(recipe.output_dir)}", soft_wrap=True)


class _Parser(argparse.ArgumentParser):
    """Quotes what it was given as it may be printed."""

    def error(self, message: str) -> NoReturn:
        """See ArgumentParser."""
        super().error(printable(shorten(message, LONGEST_ERROR)))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See ArgumentParser; what stands after `--` is kept apart for a command that passes it on."""
        words = list(sys.argv[1:] if args is None else args)
        rest = _rest_of(words[0]) if "--" in words else None
        if rest is None:
            return super().parse_args(words, namespace)
        at = words.index("--")
        parsed = super().parse_args(words[:at], namespace)
        setattr(parsed, rest, words[at + 1 :])
        return parsed

    def _print_message(self, message: str, file: Any = None) -> None:
        """As in ArgumentParser, which passes over errors of writing."""
        if message and file is not None:
            with naming_output("standard output" if file is sys.stdout else "standard error"):
                file.write(message)


def build_parser() -> argparse.ArgumentParser:
    """The command line, with types, defaults and help taken from the options' dataclasses."""
    parser = _Parser(
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


def _rest_of(command: str) -> str | None:
    """The option that takes what stands after `--`; None where a command has none."""
    fields = settable_fields(COMMANDS[command][0]) if command in COMMANDS else {}
    return next((name for name, spec in fields.items() if spec.metadata.get("rest")), None)


def _examples(calls: typing.Iterable[str]) -> str:
    return "\n".join(["example:", *(f"  {call}" for call in calls)])


def _add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    hints = type_hints(cls)
    for name, spec in settable_fields(cls).items():
        help_text = spec.metadata["help"]
        if spec.metadata.get("positional"):
            several: dict[str, Any] = {"nargs": "+"} if hints[name] == list[str] else {}
            parser.add_argument(name, metavar=name.upper(), help=help_text, **several)
            continue
        if spec.metadata.get("rest"):
            parser.description = f"{parser.description}\n\n-- {name.replace('_', '-').upper()}: {help_text}"
            parser.set_defaults(**{name: []})
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
    """Run a command line and say in one line what ended it.

    Args:
        arguments: after the command's name; those of this process by default, which is then taken to be the command.

    Returns:
        The exit status: 2 for a mistake that the user can fix, 1 or 3 for what `moelora verify` found, and what a shell
        says of a process that ended so for Ctrl-C (130) and for output that nobody reads any more (141).
    """
    is_command = arguments is None
    if is_command:
        let_interrupts(end_at_once=True)
        replace_closed_streams()
    escape_what_cannot_be_encoded()
    try:
        _run(arguments, is_command)
        return 0
    except UserError as error:
        return _fail(str(error), error.status)
    except OutputClosedError:
        status = 141
    except OSError as error:
        status = _fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error))
    except MemoryError:
        status = _fail("out of memory")
    except Exception as error:
        if not failed_to_write(error):
            raise
        status = _fail(f"a file cannot be written; is the disk full? ({error})")
    except KeyboardInterrupt as error:
        if is_command:
            let_interrupts(end_at_once=True)
        status = _fail("; ".join(["stopped", *getattr(error, "__notes__", [])]), 130)
    drop_output()
    return status


def _run(arguments: Sequence[str] | None, is_command: bool) -> None:
    """Work, and see to it that what was printed has arrived."""
    try:
        parsed = vars(build_parser().parse_args(arguments))
    except SystemExit:  # it has printed help, or what is wrong
        flush_output()
        raise
    name = parsed.pop("command")
    cls, function, _ = COMMANDS[name]
    options = cls(**parsed)
    # PEFT 0.21 reads a property that transformers 5.23 renamed: nothing that the user of a command could change.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    refuse(check_options(options))
    try:
        os.getcwd()
    except OSError:
        raise UserError("the folder that you work in is gone; change to one that is there") from None
    with printable_warnings():
        import_module("moelora.tuner.registration")
        work = pkgutil.resolve_name(function)
        if is_command:
            let_interrupts(end_at_once=False)
        work(options)
    flush_output()
    if is_command:
        let_interrupts(end_at_once=True)


def _fail(message: str, status: int = 2) -> int:
    with suppress(OSError):  # nowhere to say it: the status does
        print(f"moelora: {printable(message, lines=True)}", file=sys.stderr)
    return status
