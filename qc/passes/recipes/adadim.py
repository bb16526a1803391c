"""adadim: groups along the inputs or the outputs, whichever loses less."""

from qc.passes.quantize.adaptive_axis import AdaptiveAxis
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.recipes.recipe import Recipe
from qc.passes.recipes.rounding import STORE_16

ADADIM = Recipe(
    "adadim",
    (*STORE_16, AdaptiveAxis("int3·g128·zero"), RoundToNearest("f16")),
    paper="Heo et al. 2023, AdaDim, arXiv 2309.15531, section 3",
    claims=(
        "3 bits, g64: the better axis < rtn in perplexity",
        "3 bits, g64: the better axis + gptq < gptq",
    ),
)
