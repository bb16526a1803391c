"""Recipes by name. One file per published system or family; data only."""

from qc.passes.recipes.adadim import ADADIM
from qc.passes.recipes.claq import CLAQ
from qc.passes.recipes.float32 import F32
from qc.passes.recipes.gptq import GPTQ
from qc.passes.recipes.recipe import Recipe
from qc.passes.recipes.rounding import W2, W3, W4, W4A16, W8, W8A16
from qc.passes.recipes.spqr import SPQR
from qc.passes.recipes.squeezellm import SQUEEZELLM

ALL = (F32, W8, W8A16, W4, W4A16, W3, W2, GPTQ, SPQR, SQUEEZELLM, CLAQ, ADADIM)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in ALL}

__all__ = ["RECIPES", "Recipe"]
