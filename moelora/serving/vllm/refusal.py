"""What stands in for the plug-in where vLLM is of a version that it does not know: a clear line for every mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from ...files.adapter_files import parse_config
from .contract import VERSIONS


def is_mixture(folder: str) -> bool:
    """Whether a folder holds a mixture; False for one that holds nothing, which vLLM has its own message for.

    Raises:
        ValueError: its configuration cannot be read.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        config = parse_config(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    return config.get("peft_type") == "MOELORA" and config.get("use_moe_routing", True) is not False


def refusal(version: str) -> str:
    """What is wrong with this version of vLLM, and what to do."""
    return (
        f"moelora serves mixtures in vLLM {VERSIONS}.*, and this is {version}: `pip install 'vllm=={VERSIONS}.*'`, or "
        "export a plain LoRA with `moelora export`"
    )


def refusing_manager(stock: Any, why: str) -> type:
    """vLLM's own manager, but mixtures are refused by name; plain LoRAs are as they were."""

    class RefusingManager(stock):
        takes_mixtures = False

        def _load_adapter(self, lora_request: Any) -> Any:
            if is_mixture(lora_request.lora_path):
                raise ValueError(f"{lora_request.lora_name!r} is a mixture of LoRA experts: {why}")
            return super()._load_adapter(lora_request)

    return RefusingManager
