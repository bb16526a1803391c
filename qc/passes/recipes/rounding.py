"""w8, w4, w8a16, w4a16, w3_rtn, w2_rtn, fp8, fp4: round-to-nearest in groups of 32.

At 4 bits the scales and minima of the groups are codes of 8 bits in their turn, with a factor a
row: half a bit less for each weight, at no more loss.

`wN` also quantizes the activations of those linears to int8, in the same groups; `wNa16` keeps
them in floating point. Vocabulary tables are stored in int8, a scale a row, tables of positions in
float16; keys and values are cached in float16.

`fp8` stores weights and activations as floats of 8 bits, e4m3, with a scale a row and a token, and
the tables in float16: what vLLM and llm-compressor call FP8 dynamic. Micikevicius et al. 2022,
"FP8 Formats for Deep Learning".

`fp4` stores both as floats of 4 bits, e2m1, in groups of 16 with scales of e4m3, and a float32 for
the matrix and for each token. NVIDIA 2025, "Pretraining Large Language Models with NVFP4".
"""

import torch

from qc.ir.types import ActivationFormat
from qc.ir.weights.grouped import GroupedFormat
from qc.passes.prepare.explicit_cache import ExplicitCache
from qc.passes.quantize.activations import QuantizeActivations
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.quantize.tables import StoreTables
from qc.passes.recipes.recipe import Recipe

CACHE_16 = (ExplicitCache(torch.float16),)
TABLES_16 = (StoreTables("f16"),)
STORE_16 = (*TABLES_16, *CACHE_16)
STORE = (StoreTables("int8·row"), *CACHE_16)
E4M3_ACTIVATIONS = (QuantizeActivations(ActivationFormat(8, kind="e4m3")),)
E2M1_ACTIVATIONS = (QuantizeActivations(ActivationFormat(4, 16, "e2m1")),)
INT8_ACTIVATIONS = (QuantizeActivations(ActivationFormat(8, 32)),)

W8A16 = Recipe("w8a16", (*STORE, RoundToNearest(GroupedFormat(8, 32, "symmetric"))))
INT4 = "int4·g32·min·scale(uint8·row)·minimum(uint8·row)"

W4A16 = Recipe("w4a16", (*STORE, RoundToNearest(INT4)))
W3_RTN = Recipe(
    "w3_rtn", (*STORE, RoundToNearest(GroupedFormat(3, 32, "minimum")), *INT8_ACTIVATIONS)
)
W2_RTN = Recipe(
    "w2_rtn", (*STORE, RoundToNearest(GroupedFormat(2, 32, "minimum")), *INT8_ACTIVATIONS)
)
W8 = Recipe("w8", (*W8A16.passes, *INT8_ACTIVATIONS))
W4 = Recipe(
    "w4",
    (*W4A16.passes, *INT8_ACTIVATIONS),
    claims=("perplexity: f32 < w8 < w4", "w4 is within 1 % of w4a16 in perplexity"),
)
FP8 = Recipe("fp8", (*STORE_16, RoundToNearest("e4m3·row"), *E4M3_ACTIVATIONS))
FP4 = Recipe("fp4", (*STORE_16, RoundToNearest("nvfp4"), *E2M1_ACTIVATIONS))
