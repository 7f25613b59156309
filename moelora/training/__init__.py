"""Training: fine-tune a causal language model on named domains of text from a recipe, and measure the result."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..recipe import DomainOptions, ModelOptions, Recipe
from ..schema import Problem, RecipeError, UserError

if TYPE_CHECKING:
    from .load import load_recipe
    from .lorafa import create_lorafa_optimizer
    from .run import train

__all__ = [
    "DomainOptions",
    "ModelOptions",
    "Problem",
    "Recipe",
    "RecipeError",
    "UserError",
    "create_lorafa_optimizer",
    "load_recipe",
    "train",
]

_LAZY = {"create_lorafa_optimizer": ".lorafa", "load_recipe": ".load", "train": ".run"}
"""What needs PEFT and `datasets`, imported when somebody asks: the callback needs neither, and `--help` cannot wait."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
