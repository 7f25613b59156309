"""What can be done with experts once they exist: import, export and the operations that reshape a mixture."""

from .importing import build, from_lora
from .lora_file import LoraError, LoraFile, read_lora

__all__ = ["LoraError", "LoraFile", "build", "from_lora", "read_lora"]
