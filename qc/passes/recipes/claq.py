"""claq: a table for every input, 4 bits for the twentieth with most outliers, extremes in 16."""

from qc.passes.quantize.column_codebooks import ColumnCodebooks
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.recipes.recipe import Recipe
from qc.passes.recipes.rounding import STORE_16

CLAQ = Recipe(
    "claq",
    (
        *STORE_16,
        ColumnCodebooks("lookup3·col", wide_bits=4, wide_per_million=50_000, outliers=True),
        RoundToNearest("f16"),
    ),
    paper="Wang et al. 2024, CLAQ, arXiv 2405.17233, section 3",
    claims=(
        "3 bits: column tables < gptq a row in perplexity",
        "3 bits: with wide columns and outliers < column tables alone",
    ),
)
