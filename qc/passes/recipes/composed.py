"""w4, w3, w2: the best compositions that benchmarks.search_compositions found for so many bits.

GPTQ on grids that are searched, solved for once more with the codes, and with half of what earlier
weights have lost made up for. Scales and minima are codes in their turn, which pays for small
groups. In w2 the first and the last block, and all that makes keys and values, have 3 bits. The
head is stored in 4 bits, as nothing behind it makes up for its errors.

w4 rounds to the nearest until somebody gives data: 4 bits in groups of 32 lose little, and who
compiles in seconds is not made to wait for minutes. At 3 and 2 bits rounding is of no use.
"""

from qc.passes.quantize.gptq import Gptq
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.recipes.recipe import Recipe
from qc.passes.recipes.rounding import INT4, INT8_ACTIVATIONS, STORE, W4, W4A16

HEAD = (RoundToNearest(INT4),)

INT3 = "int3·g32·min·scale(uint6·row)·minimum(uint6·row)"
INT2 = "int2·g32·min·scale(uint6·row)·minimum(uint6·row)"

GPTQ4 = Gptq(INT4, ranges="mse", refinements=1, repair=0.5)
GPTQ3 = Gptq(INT3, ranges="mse", refinements=1, repair=0.5)
GPTQ2 = Gptq(
    INT2, damping=0.1, ranges="mse", refinements=1, repair=0.5,
    exceptions=(("ends:1", INT3), ("cached", INT3)),
)  # fmt: skip

W4A16_COMPOSED = W4A16.with_data((*STORE, GPTQ4, *HEAD))
W4_COMPOSED = W4.with_data((*STORE, GPTQ4, *HEAD, *INT8_ACTIVATIONS))
W3 = Recipe(
    "w3",
    (*STORE, GPTQ3, *HEAD, *INT8_ACTIVATIONS),
    claims=(
        "w3 < gptq with 3 bits, g64",
        "w3 < awq with 3 bits, g64",
        "w3 < claq at 3.64 bits",
        "w3 < spqr at 4.33 bits",
    ),
)
W2 = Recipe("w2", (*STORE, GPTQ2, *HEAD, *INT8_ACTIVATIONS))
