"""What can be done with experts once they exist: import, export and the operations that reshape a mixture."""

from .exporting import merge, save_lora, to_lora, to_lora_mixture
from .growth import GrowthCallback, grow
from .importing import build, from_lora
from .lora_file import LoraError, LoraFile, read_lora
from .memory import forget, refresh_gate, remember, remembers
from .migration import Migration, experts_of
from .novelty_score import Novelty, novelty
from .router_training import RouterTraining, train_router
from .scoring import score_by_arrow, score_by_prototype

__all__ = [
    "GrowthCallback",
    "LoraError",
    "LoraFile",
    "Migration",
    "Novelty",
    "RouterTraining",
    "build",
    "experts_of",
    "forget",
    "from_lora",
    "grow",
    "merge",
    "novelty",
    "read_lora",
    "refresh_gate",
    "remember",
    "remembers",
    "save_lora",
    "score_by_arrow",
    "score_by_prototype",
    "to_lora",
    "to_lora_mixture",
    "train_router",
]
