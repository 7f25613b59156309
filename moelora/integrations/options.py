"""A mixture from what a user wrote in another tool's configuration: its LoRA options, and a section of our own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..config import MoELoraConfig
from ..recipe import MIXTURE_DEFAULTS
from ..schema import Problem, RecipeError, describe
from ..training.load import check_mixture

SECTION = "moelora"
"""What our own section is called in every tool."""


@dataclass(frozen=True)
class LoraOption:
    """A LoRA option of the tool's that the user has set: what the tool calls it, and its value."""

    key: str
    value: Any


def mixture_config(
    tool: str, section: Any, lora: Mapping[str, LoraOption], *, task_type: str | None = "CAUSAL_LM"
) -> MoELoraConfig:
    """The configuration that a user's options stand for.

    Args:
        tool: where the options stand, for the message.
        section: fields of `MoELoraConfig`, or a `preset`, by name; None where there is none.
        lora: options of the tool's own, by the field of `MoELoraConfig` that they mean.
        task_type: PEFT's, where the section does not say.

    Raises:
        RecipeError: listing every problem with its key, as the user wrote it, value and fix.
    """
    if section is not None and not isinstance(section, Mapping):
        raise RecipeError(tool, [Problem(SECTION, section, f"must be a mapping, not {describe(type(section))}")])
    section = section or {}
    twice = [
        Problem(option.key, option.value, f"`{SECTION}.{field}` says it too; leave one of them out")
        for field, option in lora.items()
        if field in section
    ]
    values = {field: option.value for field, option in lora.items()} | dict(section)
    values, found = check_mixture(values, {**MIXTURE_DEFAULTS, "task_type": task_type}, SECTION)
    written = {f"{SECTION}.{field}": option.key for field, option in lora.items() if field not in section}
    problems = twice + [replace(problem, key=written.get(problem.key, problem.key)) for problem in found]
    if problems:
        raise RecipeError(tool, problems)
    return MoELoraConfig(**values)


def refused_options(given: Mapping[str, Any], refused: Mapping[str, str]) -> list[Problem]:
    """Options of the tool's that are switched on, and that a mixture would not get from it."""
    return [Problem(key, given[key], fix) for key, fix in refused.items() if given.get(key)]
