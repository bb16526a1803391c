"""svdquant: smoothing, a 16-bit branch of low rank, and few bits for the rest.

`svdquant` is the paper's W4A4: weights and activations in signed 4 bits, groups of 64. On a CPU
these activations are computed exactly but cost what int8 ones do. `svdquant_a16` keeps them in
floating point.
"""

from qc.ir.types import ActivationFormat
from qc.passes.decompose.branches import SplitBranches
from qc.passes.decompose.low_rank import SplitLowRank
from qc.passes.quantize.activations import QuantizeActivations
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.recipes.recipe import Recipe
from qc.passes.recipes.rounding import CACHE_16, TABLES_16
from qc.passes.transform.fold_scales import FoldScales
from qc.passes.transform.migrate_outliers import MigrateOutliers

FORMAT, RANK = "int4·g64", 32
INT4 = ActivationFormat(4, 64)
PAPER = "SVDQuant: Li, Lin, Zhang, Cai et al. 2024, arXiv 2411.05007"

SVDQUANT = Recipe(
    "svdquant",
    (
        *TABLES_16,
        MigrateOutliers(FORMAT, RANK, INT4),
        FoldScales(),
        *CACHE_16,
        SplitLowRank(f"rank{RANK}"),
        SplitBranches(),
        RoundToNearest(FORMAT, heads=False),
        RoundToNearest("f16"),
        QuantizeActivations(INT4),
    ),
    paper=PAPER,
    claims=("4 bits, g64, 4-bit activations: svdquant < smoothing alone < rtn",),
)
SVDQUANT_A16 = Recipe(
    "svdquant_a16",
    (
        *TABLES_16,
        MigrateOutliers(FORMAT, RANK),
        FoldScales(),
        *CACHE_16,
        SplitLowRank(f"rank{RANK}"),
        RoundToNearest(FORMAT, heads=False),
        RoundToNearest("f16"),
    ),
    paper=PAPER,
    claims=("4 bits, g64: svdquant_a16 < rtn in perplexity",),
)
