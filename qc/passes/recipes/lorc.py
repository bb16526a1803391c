"""lorc: the rounding error's leading directions beside the rounded weights (ZeroQuant-V2)."""

from qc.passes.decompose.low_rank import CompensateError
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.recipes.recipe import Recipe
from qc.passes.recipes.rounding import STORE_16

LORC = Recipe(
    "lorc",
    (
        *STORE_16,
        CompensateError(RoundToNearest("int4·g64·zero", heads=False), "rank8·factors(int8·row)"),
        RoundToNearest("f16"),
    ),
    paper="ZeroQuant-V2: Yao, Wu, Li, Youn, He 2023, arXiv 2303.08302",
    claims=("3 bits, g64: lorc with rank 32 < lorc with rank 8 < rtn in perplexity",),
)
