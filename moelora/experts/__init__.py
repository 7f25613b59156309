"""What can be done with experts once they exist: import, export and the operations that reshape a mixture."""

import warnings
from importlib import import_module
from typing import Any

from ..storage.lora_file import LoraError, LoraFile, read_lora
from .consolidate import Consolidated, Merge, consolidate
from .distil import closed_form, lora_of
from .domains import forget_domain, knows_domain, learn_domain, refresh_domain_classifier
from .evaluation import Texts
from .exporting import merge, save_lora, to_lora, to_lora_mixture
from .growth import GrowthCallback, grow
from .importing import build, from_lora, mixture_from_lora
from .merging import MergeRecipe, merge_experts
from .migration import Migration, experts_of
from .native import native_from_lora, native_to_lora
from .novelty_score import Novelty, novelty
from .parts import put_together, select, take_apart
from .per_task import TaskLora, to_loras
from .prune import drop, prune
from .scoring import score_by_arrow, score_by_prototype
from .warm_start import Nearest, copy_experts, nearest_adapter

__all__ = [
    "Consolidated",
    "GrowthCallback",
    "LoraError",
    "LoraFile",
    "Merge",
    "MergeRecipe",
    "Migration",
    "Nearest",
    "Novelty",
    "RouterTraining",
    "TaskLora",
    "Texts",
    "build",
    "closed_form",
    "consolidate",
    "copy_experts",
    "drop",
    "experts_of",
    "forget_domain",
    "from_lora",
    "grow",
    "knows_domain",
    "learn_domain",
    "lora_of",
    "merge",
    "merge_experts",
    "mixture_from_lora",
    "native_from_lora",
    "native_to_lora",
    "nearest_adapter",
    "novelty",
    "prune",
    "put_together",
    "read_lora",
    "refresh_domain_classifier",
    "save_lora",
    "score_by_arrow",
    "score_by_prototype",
    "select",
    "take_apart",
    "to_lora",
    "to_lora_mixture",
    "to_loras",
    "train_router",
]

_TRAINING = ("RouterTraining", "train_router")
"""Names of [`moelora.training.router_training`], imported when somebody asks: it needs the Trainer and `datasets`."""

_RENAMED = {
    "forget": "forget_domain",
    "refresh_gate": "refresh_domain_classifier",
    "remember": "learn_domain",
    "remembers": "knows_domain",
}


def __getattr__(name: str) -> Any:
    if name in _TRAINING:
        return getattr(import_module("moelora.training.router_training"), name)
    if name in _RENAMED:
        warnings.warn(f"`moelora.experts.{name}` is now `{_RENAMED[name]}`", DeprecationWarning, stacklevel=2)
        return globals()[_RENAMED[name]]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
