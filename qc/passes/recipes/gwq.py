"""gwq: the 1 % of weights with the largest gradients in float16, the others rounded."""

from qc.passes.decompose.outliers import SplitOutliers
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.recipes.recipe import Recipe
from qc.passes.recipes.rounding import CACHE_16, TABLES_16

GWQ = Recipe(
    "gwq",
    (
        *TABLES_16,
        SplitOutliers("gradient", "1%"),
        *CACHE_16,
        RoundToNearest("int4·g64·zero", heads=False),
        RoundToNearest("f16"),
    ),
    paper="GWQ: Shao, Lyu et al. 2024, arXiv 2411.00850",
    claims=("3 bits, g64: gwq < random outliers < rtn in perplexity",),
)
