"""Recipes by name. One file per published system or family; data only."""

from qc.passes.recipes.adadim import ADADIM
from qc.passes.recipes.awq import AWQ
from qc.passes.recipes.claq import CLAQ
from qc.passes.recipes.composed import W2, W3, W4_COMPOSED, W4A16_COMPOSED
from qc.passes.recipes.float32 import F32
from qc.passes.recipes.gptq import GPTQ
from qc.passes.recipes.gwq import GWQ
from qc.passes.recipes.lorc import LORC
from qc.passes.recipes.recipe import Recipe
from qc.passes.recipes.rounding import FP4, FP8, W2_RTN, W3_RTN, W8, W8A16
from qc.passes.recipes.smoothquant_plus import SMOOTHQUANT_PLUS
from qc.passes.recipes.spqr import SPQR
from qc.passes.recipes.squeezellm import SQUEEZELLM
from qc.passes.recipes.svdquant import SVDQUANT, SVDQUANT_A16

ROUNDING = (F32, W8, W8A16, FP8, FP4, W3_RTN, W2_RTN)
COMPOSED = (W4_COMPOSED, W4A16_COMPOSED, W3, W2)
PUBLISHED = (
    ADADIM, AWQ, CLAQ, GPTQ, GWQ, LORC, SMOOTHQUANT_PLUS, SPQR, SQUEEZELLM, SVDQUANT, SVDQUANT_A16
)  # fmt: skip

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*ROUNDING, *COMPOSED, *PUBLISHED)}

__all__ = ["COMPOSED", "PUBLISHED", "RECIPES", "ROUNDING", "Recipe"]
