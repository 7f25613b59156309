"""What run.json and operation.json must hold before anything in them is read: strangers' folders have them too."""

from functools import cache
from pathlib import Path
from typing import Any

from ..console import console, printable
from ..files.opening import NotReadableError, read_json
from ..recipe import DomainOptions, ModelOptions, Recipe
from ..schema import Problem, check_values, describe

LEARNED_BEFORE = "learned_before"


def read_checked_run(path: Path) -> dict[str, Any] | None:
    """A run.json; None where there is none, where something else wrote it or, with one warning, where it is damaged."""
    try:
        record = read_json(path)
    except OSError:
        return None
    except NotReadableError as error:
        return _pass_over(path, str(error))
    if not isinstance(record, dict) or not {"status", "recipe", "domains"} <= record.keys():
        return None
    problems = [
        *_check_kinds(record, {"status": str, "recipe": dict, "domains": dict, "seconds": dict, "steps": int}),
        *_check_recipe(record["recipe"]),
        *_check_sizes(record["domains"]),
        *_check_domains(record.get(LEARNED_BEFORE, []), LEARNED_BEFORE),
    ]
    return _pass_over(path, str(problems[0])) if problems else record


def read_checked_operation(path: Path) -> dict[str, Any]:
    """An operation.json; empty where there is none and, with one warning, where it is damaged."""
    try:
        operation = read_json(path)
    except OSError:
        return {}
    except NotReadableError as error:
        return _pass_over(path, str(error)) or {}
    if not isinstance(operation, dict):
        return _pass_over(path, "it is no mapping") or {}
    base = operation.get("base")
    problems = [
        *([] if base is None else _check_section(ModelOptions, base, "base")),
        *_check_domains(operation.get(LEARNED_BEFORE, []), LEARNED_BEFORE),
    ]
    return _pass_over(path, str(problems[0])) or {} if problems else operation


@cache
def _pass_over(path: Path, reason: str) -> None:
    why = " ".join(printable(reason, lines=True).split())
    told = f"{printable(path)} is damaged and passed over, so what it says of the base model and texts is unknown"
    console.print(f"{told}: {why}", soft_wrap=True)


def _check_kinds(record: dict[str, Any], kinds: dict[str, type]) -> list[Problem]:
    return [
        Problem(name, record[name], f"must be {describe(kind)}")
        for name, kind in kinds.items()
        if name in record and not isinstance(record[name], kind)
    ]


def _check_recipe(recipe: Any) -> list[Problem]:
    if found := _check_section(Recipe, recipe, "recipe"):
        return found
    return [
        *_check_section(ModelOptions, recipe["model"], "recipe.model"),
        *_check_domains(recipe["data"], "recipe.data"),
    ]


def _check_domains(domains: Any, key: str) -> list[Problem]:
    if not isinstance(domains, list):
        return [Problem(key, domains, "must be a list")]
    return [problem for each in domains for problem in _check_section(DomainOptions, each, key)]


def _check_sizes(domains: Any) -> list[Problem]:
    """What a run notes of each of its domains: numbers, null where they are not finite, and loads of experts."""
    noted = domains.items() if isinstance(domains, dict) else ()
    return [
        Problem(f"domains.{name}", sizes, "must be numbers by name")
        for name, sizes in noted
        if not isinstance(sizes, dict) or not all(map(_is_number, (v for k, v in sizes.items() if "load" not in k)))
    ]


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (int, float))


def _check_section(cls: type, section: Any, key: str) -> list[Problem]:
    if not isinstance(section, dict):
        return [Problem(key, section, "must be a mapping")]
    return check_values(cls, section, key)
