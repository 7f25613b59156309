"""What stands in for the plug-in where vLLM is of a version that it does not know: a clear line for every mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .contract import VERSIONS


def is_mixture(folder: str) -> bool:
    """Whether a folder holds a mixture; False for one that holds nothing, which vLLM has its own message for."""
    file = Path(folder) / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: {error}; save the adapter again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: it holds no JSON object; save the adapter again")
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
