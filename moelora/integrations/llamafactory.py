"""`peft_config: {name: moelora}` in LLaMA-Factory's v1: ``python -m moelora.integrations.llamafactory sft train.yaml``.

LLaMA-Factory reads no module of a user's, so its command cannot know us; this one registers, and goes on as its own
does (docs/tools.md). Written for the release in `VERSIONS`; tests/tools/test_llamafactory.py compares what is used.
"""

from __future__ import annotations

import sys
from typing import Any

from llamafactory.v1.launcher import main as launch
from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin
from peft import PeftModel, get_peft_model

from ..config import MoELoraConfig
from ..schema import Problem, RecipeError, UserError
from .options import mixture_config

VERSIONS = "0.9.5"
"""The release of LLaMA-Factory whose names these are."""

PLUGIN = "moelora"
COMMANDS = ("sft", "train", "rm")
"""Its commands that train; `chat` and `merge` add all experts to the base weights."""


@PeftPlugin(PLUGIN).register()
def adapt(model: Any, config: dict[str, Any], is_train: bool = False) -> PeftModel:
    """Put a new mixture on the model, or the one that is saved in `adapter_name_or_path`.

    Args:
        config: `peft_config` of LLaMA-Factory's YAML: `name`, `adapter_name_or_path`, and fields of `MoELoraConfig` or
            a `preset`; `target_modules: all` is PEFT's "all-linear".

    Raises:
        RecipeError: listing every problem with its key, value and fix.
        ValueError: `adapter_name_or_path` holds no mixture, or it does not fit the model.
    """
    if getattr(model, "_init_mode", None) == "init_on_meta":
        raise RecipeError("LLaMA-Factory", [Problem("init_config.name", "init_on_meta", "drop it: as for its LoRA")])
    section = {key: value for key, value in config.items() if key not in ("name", "adapter_name_or_path")}
    if section.get("target_modules") == "all":
        section["target_modules"] = "all-linear"
    made = mixture_config("LLaMA-Factory", section, {})
    folder = config.get("adapter_name_or_path")
    if folder is None:
        return get_peft_model(model, made)
    wrapped = PeftModel.from_pretrained(model, folder, is_trainable=is_train)
    loaded = wrapped.peft_config[wrapped.active_adapter]
    if not isinstance(loaded, MoELoraConfig):
        raise ValueError(
            f"`adapter_name_or_path` ({folder!r}) holds a {type(loaded).__name__} and no mixture; use `name: lora`, or "
            "make it an expert with `moelora build`"
        )
    return wrapped


def main() -> None:
    """LLaMA-Factory's command, one process; under torchrun, one of several.

    Raises:
        UserError: the command does not train.
    """
    command = sys.argv[1] if len(sys.argv) > 1 else None
    if command not in COMMANDS:
        raise UserError(
            f"`{command}` does not train; use one of {', '.join(COMMANDS)}. LLaMA-Factory merges whatever it chats "
            "with or exports: `moelora serve` and `moelora export` know experts"
        )
    launch()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
