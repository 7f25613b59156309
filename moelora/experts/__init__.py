"""What can be done with experts once they exist: import, export and the operations that reshape a mixture."""

from .exporting import merge, save_lora, to_lora, to_lora_mixture
from .importing import build, from_lora
from .lora_file import LoraError, LoraFile, read_lora
from .migration import Migration, experts_of
from .router_training import RouterTraining, train_router
from .scoring import score_by_arrow, score_by_prototype

__all__ = [
    "LoraError",
    "LoraFile",
    "Migration",
    "RouterTraining",
    "build",
    "experts_of",
    "from_lora",
    "merge",
    "read_lora",
    "save_lora",
    "score_by_arrow",
    "score_by_prototype",
    "to_lora",
    "to_lora_mixture",
    "train_router",
]
