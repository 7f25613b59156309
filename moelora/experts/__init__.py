"""What can be done with experts once they exist: import, export and the operations that reshape a mixture."""

from importlib import import_module
from typing import Any

from ..storage.lora_file import LoraError, LoraFile, read_lora
from .distil import closed_form, lora_of
from .exporting import merge, save_lora, to_lora, to_lora_mixture
from .growth import GrowthCallback, grow
from .importing import build, from_lora
from .memory import forget, refresh_gate, remember, remembers
from .merging import MergeRecipe, merge_experts
from .migration import Migration, experts_of
from .novelty_score import Novelty, novelty
from .parts import put_together, select, take_apart
from .prune import drop, prune
from .reading import Texts
from .scoring import score_by_arrow, score_by_prototype

__all__ = [
    "GrowthCallback",
    "LoraError",
    "LoraFile",
    "MergeRecipe",
    "Migration",
    "Novelty",
    "RouterTraining",
    "Texts",
    "build",
    "closed_form",
    "drop",
    "experts_of",
    "forget",
    "from_lora",
    "grow",
    "lora_of",
    "merge",
    "merge_experts",
    "novelty",
    "prune",
    "put_together",
    "read_lora",
    "refresh_gate",
    "remember",
    "remembers",
    "save_lora",
    "score_by_arrow",
    "score_by_prototype",
    "select",
    "take_apart",
    "to_lora",
    "to_lora_mixture",
    "train_router",
]

_TRAINING = ("RouterTraining", "train_router")
"""Names of [`moelora.training.router_training`], imported when somebody asks: it needs the Trainer and `datasets`."""


def __getattr__(name: str) -> Any:
    if name in _TRAINING:
        return getattr(import_module("moelora.training.router_training"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
