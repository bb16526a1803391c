"""squeezellm: a table a row, fitted where the loss feels it, and outliers beside it."""

from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.quantize.sensitive_tables import SensitiveTables
from qc.passes.recipes.recipe import Recipe
from qc.passes.recipes.rounding import STORE_16

SQUEEZELLM = Recipe(
    "squeezellm",
    (*STORE_16, SensitiveTables("lookup4·row + sparse0.45%"), RoundToNearest("f16")),
    paper="Kim et al. 2023, SqueezeLLM, arXiv 2306.07629, section 4",
    claims=(
        "3 bits a row: weighted tables < plain k-means < rtn in perplexity",
        "3 bits a row: tables with 0.45% sparse < tables alone",
    ),
)
