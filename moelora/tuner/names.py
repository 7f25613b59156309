"""What an adapter may be called, checked when it is made.

PEFT finds the tensors of an adapter by its name as a part of their names. A name that is a part of a module's name too
would take tensors from other adapters, or lose its own.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

LONGEST_NAME = 128
MOST_NAME_BYTES = 255  # in UTF-8: a folder may have to be called so
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
