"""spqr: groups of 16, scales in 3 bits, single outliers in 16."""

from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.quantize.spqr import Spqr
from qc.passes.recipes.recipe import Recipe
from qc.passes.recipes.rounding import STORE_16

SPQR = Recipe(
    "spqr",
    (*STORE_16, Spqr(), RoundToNearest("f16")),
    paper="Dettmers et al. 2023, SpQR, arXiv 2306.03078, algorithm 1",
    claims=(
        "3 bits: spqr < gptq with groups of 32 in perplexity",
        "3 bits: spqr with outliers < spqr without",
        "a smaller tau keeps more outliers",
    ),
)
