"""Write the tables of the documentation from the dataclasses, so that help is written once.

python -m moelora.cli.docs_tables docs/*.md
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig

from ..config import MoELoraConfig
from ..config_rules import REFUSED_OPTIONS
from ..presets import PRESETS
from ..recipe import MIXTURE_DEFAULTS, TRAINING_DEFAULTS, DomainOptions, ModelOptions, Recipe
from ..routing import BALANCING_LOSSES, ROUTER_KINDS
from ..schema import describe, is_required, settable_fields, type_hints
from .options import COMMANDS

MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
"""Where a page wants a table: everything between the two comments is replaced."""


def tables() -> dict[str, str]:
    """Every table by the name that a page's comments ask for."""
    inherited = settable_fields(LoraConfig)
    own = [name for name in settable_fields(MoELoraConfig) if name not in inherited]
    commands = {name: options_table(options) for name, (options, _, _) in COMMANDS.items()}
    return commands | {
        "recipe": options_table(Recipe),
        "model": options_table(ModelOptions),
        "domain": options_table(DomainOptions),
        "mixture": options_table(MoELoraConfig, own),
        "defaults": defaults_table(),
        "presets": presets_table(),
        "refused": _table(
            ("field of LoraConfig", "why a mixture refuses it"),
            [(f"`{name}`", reason) for name, reason in REFUSED_OPTIONS.items()],
        ),
        "router_types": _table(
            ("router_type", "weights"), [(f"`{kind.name}`", kind.weights) for kind in ROUTER_KINDS.values()]
        ),
        "balancing": _table(
            ("load_balance_loss_type", "loss", "source"),
            [(f"`{loss.name}`", loss.formula, loss.source) for loss in BALANCING_LOSSES.values()],
        ),
    }


def options_table(cls: type, names: Sequence[str] | None = None) -> str:
    """One row per field: name, type, default, help."""
    fields, hints = settable_fields(cls), type_hints(cls)
    rows = [
        (f"`{name}`", describe(hints[name]), _default(fields[name]), fields[name].metadata["help"])
        for name in names or fields
    ]
    return _table(("key", "type", "default", "meaning"), rows)


def defaults_table() -> str:
    """What the job sets where the recipe is silent."""
    sections = {"mixture": MIXTURE_DEFAULTS, "training": TRAINING_DEFAULTS}
    rows = [
        (f"`{section}.{name}`", f"`{value}`") for section, values in sections.items() for name, value in values.items()
    ]
    return _table(("key", "default"), rows)


def presets_table() -> str:
    """What each preset sets."""
    rows = [
        (f"`{name}`", ", ".join(f"`{field}={value!r}`" for field, value in options.items()))
        for name, options in PRESETS.items()
    ]
    return _table(("preset", "sets"), rows)


def render(page: str) -> str:
    """A page with all its tables brought up to date."""
    known = tables()
    return MARKED.sub(lambda match: f"{match[1]}{known[match[2]]}\n{match[3]}", page)


def _default(spec: dataclasses.Field[Any]) -> str:
    if is_required(spec):
        return "required"
    if spec.default is dataclasses.MISSING:
        return "empty"
    return "" if spec.default is None else f"`{spec.default}`"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path = Path(argument)
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
