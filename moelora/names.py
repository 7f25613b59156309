"""What an adapter may be called, and which patterns of module names end: both checked when an adapter is made.

PEFT finds the tensors of an adapter by its name as a part of their names. A name that is a part of a module's name too
would take tensors from other adapters, or lose its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

LONGEST_NAME = 128
MOST_NAME_BYTES = 255  # in UTF-8: a folder may have to be called so
PATTERN_SECONDS = 5.0
_HOLDS_ADAPTERS = frozenset(
    (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_dropout",
        "lora_magnitude_vector",
        "lora_router",
        "modules_to_save",
        "trainable_tokens_delta",
        "trainable_tokens_original",
    )
)
_PARTS_OF_PEFT = _HOLDS_ADAPTERS | frozenset(
    ("base_model", "base_layer", "moe_router", "original_module", "token_adapter", "weight", "bias")
)
_ALONE = "model"
_OF_CONTAINERS = frozenset(dir(nn.ModuleDict())) | frozenset(dir(nn.ParameterDict()))
"""What a container of adapters has as attributes: it takes no module of such a name."""

# Python's `re` can neither be stopped nor told a limit, so patterns that might never end are tried where they can be.
_TRY = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.fullmatch(pattern, name)
        re.match(rf"(.*\\.)?({pattern})$", name)
"""


def check_adapter_name(name: Any, model: nn.Module, others: Collection[str] = ()) -> None:
    """Refuse a name under which an adapter, or another beside it, would not be saved and loaded whole.

    Args:
        model: the base model; parts of its modules' and parameters' names are taken.
        others: names of the model's other adapters.

    Raises:
        ValueError: saying what about the name is wrong.
    """
    if problem := name_problem(name) or _clash(name, model):
        raise ValueError(f"an adapter cannot be named {name!r}: {problem}; choose another name")
    if others and _ALONE in (name, *others):
        raise ValueError(
            f"an adapter cannot be named {name!r} beside {', '.join(map(repr, others))}: {_ALONE!r} is a part of all "
            "tensors' names in PEFT, so that adapter can only be alone; name it otherwise when it is made"
        )


def name_problem(name: Any) -> str | None:
    """What is wrong with an adapter's name in any model; None where nothing is."""
    if not isinstance(name, str) or not name:
        return "a name is a text that is not empty"
    if len(name) > LONGEST_NAME:
        return f"it has more than {LONGEST_NAME} characters"
    if not name.isprintable():
        return "it holds characters that cannot be printed"
    if len(name.encode()) > MOST_NAME_BYTES:
        return f"it has more than {MOST_NAME_BYTES} bytes in UTF-8, and no folder can be called so"
    if found := [character for character in "./\\" if character in name]:
        return f"`{found[0]}` separates parts of names and of paths"
    if name in _PARTS_OF_PEFT or name in _OF_CONTAINERS:
        return "PEFT or PyTorch use that name themselves"
    return None


def _clash(name: str, model: nn.Module) -> str | None:
    own = [full for kind in (model.named_modules, model.named_parameters, model.named_buffers) for full, _ in kind()]
    if name == _ALONE or name not in {part for full in own for part in _before_adapters(full.split("."))}:
        return None
    return "the model has a module or parameter of that name, by which tensors are told apart"


def _before_adapters(parts: list[str]) -> list[str]:
    """The parts of a name up to where adapters are kept by their own names."""
    return parts[: next((place for place, part in enumerate(parts) if part in _HOLDS_ADAPTERS), len(parts))]


def check_patterns_end(config: Any, names: Iterable[str]) -> None:
    """Refuse regular expressions that do not come to an end on the names of a model's modules.

    Args:
        config: a LoRA's configuration.
        names: of the modules.

    Raises:
        ValueError: naming the field.
    """
    fields = {name: _patterns(getattr(config, name, None)) for name in _FIELDS_OF_PATTERNS}
    suspects = {name: found for name, patterns in fields.items() if (found := [p for p in patterns if _repeats(p)])}
    if not suspects:
        return
    names = [name for name in names if name]
    for field, patterns in suspects.items():
        try:
            subprocess.run(
                [sys.executable, "-I", "-S", "-c", _TRY],
                input=json.dumps([patterns, names]).encode(),
                capture_output=True,
                timeout=PATTERN_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"`{field}` ({str(patterns)[:200]}) is a pattern that did not come to an end on {len(names)} module "
                f"names in {PATTERN_SECONDS:.0f} s; write one without repetitions inside repetitions"
            ) from None


_FIELDS_OF_PATTERNS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)


def _patterns(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _repeats(pattern: str) -> bool:
    """Whether a pattern may take longer than its names are long, squared: it repeats twice, or repeats a group."""
    return sum(map(pattern.count, "*+{?")) > 1 or any(f"){sign}" in pattern for sign in "*+{")
