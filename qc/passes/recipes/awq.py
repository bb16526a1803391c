"""awq: activation-aware scales and clipping, then round-to-nearest. AWQ's defaults, groups of 64.

The paper's groups of 128 do not divide the inputs of small models.
"""

from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.recipes.recipe import Recipe
from qc.passes.recipes.rounding import CACHE_16, TABLES_16
from qc.passes.transform.awq import AwqScales
from qc.passes.transform.clip_weights import ClipWeights
from qc.passes.transform.fold_scales import FoldScales

FORMAT = "int4·g64·zero"

AWQ = Recipe(
    "awq",
    (
        *TABLES_16,
        AwqScales(FORMAT),
        FoldScales(),
        ClipWeights(FORMAT),
        *CACHE_16,
        RoundToNearest(FORMAT, heads=False),
        RoundToNearest("f16"),
    ),
    paper="AWQ: Lin, Tang, Tang, Yang et al. 2023, arXiv 2306.00978",
    claims=(
        "3 bits, g64: awq < rtn in perplexity",
        "3 bits, g64: awq < awq without clipping in perplexity",
    ),
)
