"""The main job: fine-tune a causal language model on named domains of text from a recipe, and measure the result."""

from .load import load_recipe
from .recipe import DomainOptions, ModelOptions, Recipe
from .run import train
from .schema import Problem, RecipeError, UserError

__all__ = ["DomainOptions", "ModelOptions", "Problem", "Recipe", "RecipeError", "UserError", "load_recipe", "train"]
