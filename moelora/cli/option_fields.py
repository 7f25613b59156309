"""What options of commands are made of: kinds of fields, help that several share, and checks of what was given.

Nothing is imported here that takes time, as in options.py.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files.opening import expand_user, real_path_or_hub_id
from ..schema import Problem, check_values, option, settable_fields

ADAPTER_HELP = "folder that holds the adapter; it is only read"
BASE_HELP = "folder, .gguf file or hub id of the base model; by default the one the adapter was made for"
TRAINED_BASE_HELP = "folder, .gguf file or hub id of the base model; by default the one the adapter was trained on"
KEPT_HELP = "the old one stays beside it as NAME.backup-N until you remove it, and `moelora undo` brings it back"
DATA_HELP = (
    "texts of a domain: a name of your choice and a .jsonl file, a text file, a pattern or a folder that `datasets` "
    "reads; once per domain"
)


# ---- kinds of fields -------------------------------------------------------------------------------------------------

# `Any` stands for the type that the field is annotated with.


def required(help_text: str, **more: Any) -> Any:
    return option(help_text, **more)


def choice(default: Any, help_text: str, **more: Any) -> Any:
    return option(help_text, default=default, **more)


def optional(help_text: str, **more: Any) -> Any:
    return choice(None, help_text, **more)


def flag(help_text: str) -> Any:
    return choice(False, help_text)


def many(help_text: str, metavar: str = "DOMAIN=FILE") -> Any:
    return option(help_text, default_factory=list, metavar=metavar)


def rest(help_text: str) -> Any:
    """All that stands after a `--`."""
    return option(help_text, default_factory=list, rest=True)


def adapter_folder(help_text: str = ADAPTER_HELP) -> Any:
    return required(help_text, check=is_folder, positional=True)


def base_model(help_text: str = BASE_HELP) -> Any:
    return optional(help_text)


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_options(options: Any) -> list[Problem]:
    """What is out of range, each under the name by which the command line knows it."""
    fields = settable_fields(type(options))

    def shown(name: str) -> str:
        return name.upper() if fields[name].metadata.get("positional") else f"--{name.replace('_', '-')}"

    return [replace(problem, key=shown(problem.key)) for problem in check_values(type(options), vars(options), "")]


def read_pairs(given: Sequence[str], flag: str, example: str, what: str) -> tuple[dict[str, str], list[Problem]]:
    """Options of the form NAME=PATH, and what is wrong with them: their form, or two of one name."""
    pairs: dict[str, str] = {}
    problems = []
    for text in given:
        name, _, path = text.partition("=")
        if not name or not path:
            problems.append(Problem(flag, text, f"must be {example}"))
        elif name in pairs:
            problems.append(Problem(flag, text, f"two {what} are named {name!r}; rename one"))
        else:
            pairs[name] = path
    return pairs, problems


def whole_path(folder: str | Path) -> Path:
    """A folder by its whole path, without `..`: what is renamed needs a name."""
    return Path(os.path.abspath(expand_user(folder)))


def is_folder(value: str) -> str | None:
    return None if expand_user(value).is_dir() else "no such folder; give the `output_dir` of a finished run"


def may_be_on_hub(value: str) -> bool:
    """Whether a text has the form of a hub id, and nothing of that name lies here."""
    return value.count("/") == 1 and real_path_or_hub_id(value, Path.cwd()) == value


def is_file(value: str) -> str | None:
    return None if Path(value).is_file() else "no such file; give the path of a recipe"


def is_port(value: int) -> str | None:
    return None if 0 < value < 65536 else "must be between 1 and 65535"
