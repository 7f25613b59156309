"""Turn plain mappings into checked dataclasses, collecting every problem instead of stopping at the first.

The dataclass is the single source: its annotations give the types, its defaults the defaults, and each field's metadata
the help text and the rule its value must obey.
"""

import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from .console import printable

_HALF = re.compile("[\ud800-\udfff]")  # of a character, or a byte of a command line that is no UTF-8

Check = Callable[[Any], str | None]
"""A rule for one value: returns None when the value is fine, else what to do about it."""


class UserError(Exception):
    """A mistake the user can fix: the command line prints the message alone and exits with its status."""

    status = 2


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: where, what stands there, and what to do about it."""

    key: str
    value: Any
    fix: str

    def __str__(self) -> str:
        shown = "" if self.value is MISSING else f" = {shorten(repr(self.value))}"
        return f"{printable(self.key)}{shown}\n    {printable(self.fix, lines=True)}"


def refuse(problems: Sequence[Problem], *heading: str) -> None:
    """Raise a UserError that lists all problems, where there are any."""
    if problems:
        raise UserError("\n".join([*heading, *map(str, problems)]))


@contextmanager
def telling_user(prefix: str = "") -> Iterator[None]:
    """Within, a ValueError is a mistake the user can fix, told after the prefix."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from error


class RecipeError(UserError, ValueError):
    """Everything wrong with a recipe, at once.

    Attributes:
        problems: one entry per problem found, each with key, value and fix.
    """

    def __init__(self, source: str | Path, problems: list[Problem]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"{printable(source)}: {count}", *map(str, problems)]))


def option(
    help_text: str, *, default: Any = MISSING, default_factory: Any = MISSING, check: Check | None = None, **more: Any
) -> Any:
    """A dataclass field that knows its help text and, optionally, the rule its value must obey.

    Args:
        more: what else its metadata are to say.
    """
    metadata = {"help": help_text, "check": check, **more}
    return dataclasses.field(default=default, default_factory=default_factory, metadata=metadata)


def positive(value: float) -> str | None:
    if value > sys.float_info.max:  # infinity, or a whole number that has no float
        return "must be a finite number"
    return None if value > 0 else "must be greater than 0"


def not_negative(value: float) -> str | None:
    if value > sys.float_info.max:
        return "must be a finite number"
    return None if value >= 0 else "must be 0 or greater"


def between_0_and_1(value: float) -> str | None:
    return None if 0 < value < 1 else "must be greater than 0 and less than 1"


def at_least(minimum: int) -> Check:
    return lambda value: None if value >= minimum else f"must be {minimum} or greater"


def is_text(value: str) -> str | None:
    """The rule for all text: what no file name and no tokenizer takes is refused."""
    if "\0" in value:
        return "must not hold a zero byte"
    return "must be UTF-8 text: it holds half a character" if _HALF.search(value) else None


def not_empty(value: str) -> str | None:
    return None if value else "must not be empty"


def a_seed(value: int) -> str | None:
    """The range that NumPy takes."""
    return None if 0 <= value < 2**32 else f"must be 0 to {2**32 - 1}"


def one_of(*choices: str) -> Check:
    return lambda value: (
        None if value in choices else f"must be one of {', '.join(choices)}{did_you_mean(value, choices)}"
    )


def shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def did_you_mean(word: object, known: Collection[str]) -> str:
    """The closest known word as a question to append to a message, or nothing when none is close.

    >>> did_you_mean("max_step", ["max_steps", "seed"])
    '; did you mean `max_steps`?'
    >>> did_you_mean("zebra", ["max_steps", "seed"])
    ''
    """
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def type_hints(cls: type) -> dict[str, Any]:
    return {name: hint for name, hint in typing.get_type_hints(cls).items() if name in settable_fields(cls)}


def settable_fields(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a dataclass that its constructor takes, by name."""
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def check_values(
    cls: type,
    values: Mapping[str, Any],
    key: str,
    *,
    rules: Mapping[str, Check] | None = None,
    others: Sequence[str] = (),
) -> list[Problem]:
    """Compare a mapping with a dataclass's fields: unknown keys, wrong types, broken rules, missing keys.

    Args:
        cls: the dataclass the values are for.
        values: the mapping as written by the user.
        key: where the mapping stands, for the messages; empty at the top.
        rules: rules for fields whose dataclass carries none.
        others: keys taken out before, which a mistyped one may have meant.
    """
    fields, hints = settable_fields(cls), type_hints(cls)
    prefix = f"{key}." if key else ""
    problems = [
        Problem(f"{prefix}{name}", MISSING, f"missing; {field.metadata['help']}")
        for name, field in fields.items()
        if is_required(field) and name not in values
    ]
    for name, value in values.items():
        fix: str | None
        if name not in fields:
            fix = f"unknown key{did_you_mean(name, [*fields, *others])}"
        elif not matches(value, hints[name]):
            fix = f"must be {describe(hints[name])}, not {describe(type(value))}"
        elif isinstance(value, str) and (choices := enum_values(hints[name])) and value not in choices:
            fix = did_you_mean(value, choices).removeprefix("; ") or f"must be one of {', '.join(choices)}"
        elif not (fix := _storable(value, hints[name])):
            check = (rules or {}).get(name) or fields[name].metadata.get("check")
            fix = check(value) if check and value is not None else None
        if fix:
            problems.append(Problem(f"{prefix}{name}", value, fix))
    return problems


def _storable(value: Any, hint: Any) -> str | None:
    """What no file name, tokenizer or tensor takes, whatever the field."""
    if isinstance(value, int) and float not in (hint, *typing.get_args(hint)) and not -(2**63) <= value < 2**63:
        return "must be a whole number of 64 bits at most"
    texts = value if isinstance(value, list) else [value]
    return next((fix for text in texts if isinstance(text, str) and (fix := is_text(text))), None)


def matches(value: Any, hint: Any) -> bool:
    """Whether a value read from YAML fits a type annotation; annotations it does not know fit anything.

    >>> matches(1, float), matches(True, int), matches(None, int | None), matches(["a", 1], list[str])
    (True, False, True, False)
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, argument) for argument in arguments)
    if origin in (list, tuple):
        return isinstance(value, list) and all(matches(item, arguments[0]) for item in value)
    if origin is dict or dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool, list, dict, types.NoneType):
        return isinstance(value, hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, (str, hint))
    return True


def enum_values(hint: Any) -> list[str]:
    """The values an annotation such as `SchedulerType | str` allows; empty where it names no enumeration."""
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if isinstance(kind, type) and issubclass(kind, Enum)]
    return [str(member.value) for kind in kinds for member in kind]


def culprit(message: str, values: Mapping[str, Any]) -> str | None:
    """The field that an error message is about: the first one it names."""
    for pattern in (r"`(\w+)", r"\w{3,}"):
        for word in re.findall(pattern, message):
            if word in values:
                return word
    return None


def describe(hint: Any) -> str:
    """A type annotation in a reader's words.

    >>> describe(float | None)
    'a number or null'
    """
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping",
             list: "a list", types.NoneType: "null"}  # fmt: skip
    if hint in words:
        return words[hint]
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(argument) for argument in typing.get_args(hint)))
    if origin in (list, tuple):
        return f"a list of {describe(typing.get_args(hint)[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    if origin is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "text"
    return getattr(hint, "__name__", str(hint))
