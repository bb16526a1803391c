"""gptq: integer codes in groups, values by second-order error feedback."""

from qc.passes.quantize.gptq import Gptq
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.recipes.recipe import Recipe
from qc.passes.recipes.rounding import STORE_16

GPTQ = Recipe(
    "gptq",
    (*STORE_16, Gptq("int4·g128·zero"), RoundToNearest("f16")),
    paper="Frantar et al. 2022, GPTQ, arXiv 2210.17323, algorithm 1",
    claims=(
        "3 bits, g64: gptq < rtn in perplexity",
        "3 bits, g64: gptq with act-order < gptq without",
        "the gap between rtn and gptq is larger at 3 bits than at 4",
    ),
)
