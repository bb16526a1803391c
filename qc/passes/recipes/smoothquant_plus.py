"""smoothquant_plus: one smoothing exponent for the whole model, then round-to-nearest."""

from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.recipes.recipe import Recipe
from qc.passes.recipes.rounding import CACHE_16, TABLES_16
from qc.passes.transform.fold_scales import FoldScales
from qc.passes.transform.smooth_activations import SearchSmoothing

FORMAT = "int4·g64·zero"

SMOOTHQUANT_PLUS = Recipe(
    "smoothquant_plus",
    (
        *TABLES_16,
        SearchSmoothing(FORMAT),
        FoldScales(),
        *CACHE_16,
        RoundToNearest(FORMAT, heads=False),
        RoundToNearest("f16"),
    ),
    paper="SmoothQuant+: Pan, Wang et al. 2023, arXiv 2312.03788",
    claims=("3 bits, g64: smoothquant_plus < rtn in perplexity",),
)
