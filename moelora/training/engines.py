"""Which of accelerate's engines trains, as the arguments and the launcher say."""

import os

from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled


def uses_fsdp(arguments: TrainingArguments) -> bool:
    return bool(arguments.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true"


def shards_parameters(arguments: TrainingArguments) -> bool:
    """Whether a process holds a part of the model alone, but for the layers that are running: FSDP, ZeRO-3."""
    return uses_fsdp(arguments) or is_deepspeed_zero3_enabled()
