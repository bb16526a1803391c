"""What the papers claim, as data: configurations, and orders of them that must reproduce.

An order is of perplexities on text that nobody was calibrated on, each configuration at its own
stored bits. `decide` reads results and says what holds; nothing here is tuned until it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from qc.ir.types import ActivationFormat
from qc.passes.decompose.branches import SplitBranches
from qc.passes.decompose.low_rank import CompensateError, SplitLowRank
from qc.passes.decompose.outliers import SplitOutliers
from qc.passes.pipeline import Pass, Pipeline
from qc.passes.quantize.activations import QuantizeActivations
from qc.passes.quantize.adaptive_axis import AdaptiveAxis
from qc.passes.quantize.column_codebooks import ColumnCodebooks
from qc.passes.quantize.gptq import Gptq
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.quantize.sensitive_tables import SensitiveTables
from qc.passes.quantize.spqr import Spqr
from qc.passes.recipes import RECIPES
from qc.passes.recipes.composed import GPTQ2, GPTQ3
from qc.passes.recipes.rounding import CACHE_16, TABLES_16
from qc.passes.transform.awq import AwqScales
from qc.passes.transform.clip_weights import ClipWeights
from qc.passes.transform.fold_scales import FoldScales
from qc.passes.transform.migrate_outliers import MigrateOutliers
from qc.passes.transform.rotate_heads import RotateHeads
from qc.passes.transform.rotate_stream import RotateStream
from qc.passes.transform.smooth_activations import SearchSmoothing

THREE, FOUR = "int3·g64·zero", "int4·g64·zero"
AFTER = (*CACHE_16, RoundToNearest("f16"))
ROTATED = (RotateStream(), RotateHeads())
A4 = ActivationFormat(4, 64)
BRANCH = (SplitLowRank("rank32"), SplitBranches())
MIGRATED = (MigrateOutliers("int4·g64", 32, A4, grid=10), FoldScales())


DATA_FREE = (
    CompensateError, QuantizeActivations, RoundToNearest, SplitBranches, SplitLowRank,
)  # fmt: skip
"""Passes that do not look at data, as they are used here."""


def rtn(format: str) -> Pass:
    """Round the linears of the blocks."""
    return RoundToNearest(format, heads=False)


def scaled(format: str) -> tuple[Pass, ...]:
    """Search AWQ's scales and fold them."""
    return AwqScales(format), FoldScales()


CONFIGURATIONS: dict[str, tuple[Pass, ...]] = {
    "float": (),
    "rtn3": (rtn(THREE),),
    "rtn4": (rtn(FOUR),),
    "gptq3": (Gptq(THREE),),
    "gptq4": (Gptq(FOUR),),
    "gptq3 in order": (Gptq(THREE, act_order=False, static_groups=False),),
    "gptq3 g32": (Gptq("int3·g32·zero"),),
    "gptq3 row": (Gptq("int3·row·zero"),),
    "rtn3 row": (rtn("int3·row·zero"),),
    "spqr": (Spqr(),),
    "spqr without outliers": (Spqr(tau=1e9),),
    "spqr tau 0.1": (Spqr(tau=0.1),),
    "squeezellm3": (SensitiveTables("lookup3·row + sparse0.45%"),),
    "squeezellm3 dense": (SensitiveTables("lookup3·row"),),
    "squeezellm3 plain": (SensitiveTables("lookup3·row", weighted=False),),
    "claq3": (ColumnCodebooks("lookup3·col", wide_per_million=50_000, outliers=True),),
    "claq3 tables": (ColumnCodebooks("lookup3·col"),),
    "adadim3": (AdaptiveAxis(THREE),),
    "adadim3 nearest": (AdaptiveAxis(THREE, values="nearest"),),
    "awq3": (*scaled(THREE), ClipWeights(THREE), rtn(THREE)),
    "awq3 scales": (*scaled(THREE), rtn(THREE)),
    "awq4": (*scaled(FOUR), ClipWeights(FOUR), rtn(FOUR)),
    "awq + gptq3": (*scaled(THREE), Gptq(THREE)),
    "smoothquant+3": (SearchSmoothing(THREE), FoldScales(), rtn(THREE)),
    "lorc3 rank 8": (CompensateError(rtn(THREE), "rank8·factors(int8·row)"),),
    "lorc3 rank 32": (CompensateError(rtn(THREE), "rank32·factors(int8·row)"),),
    "gwq3": (SplitOutliers("gradient", "1%"), rtn(THREE)),
    "gwq3 random": (SplitOutliers("random", "1%"), rtn(THREE)),
    "gwq3 magnitude": (SplitOutliers("magnitude", "1%"), rtn(THREE)),
    "svdquant": (*MIGRATED, *BRANCH, rtn("int4·g64"), QuantizeActivations(A4)),
    "svdquant without smoothing": (*BRANCH, rtn("int4·g64"), QuantizeActivations(A4)),
    "w4a4 smoothed": (
        MigrateOutliers("int4·g64", 0, A4, grid=10), FoldScales(), rtn("int4·g64"),
        QuantizeActivations(A4),
    ),
    "w4a4": (rtn("int4·g64"), QuantizeActivations(A4)),
    "svdquant a16": (
        MigrateOutliers("int4·g64", 32, grid=10), FoldScales(), SplitLowRank("rank32"),
        rtn("int4·g64"),
    ),
    "rtn4 symmetric": (rtn("int4·g64"),),
    "gptq3 mse": (Gptq(THREE, ranges="mse"),),
    "gptq3 refined": (Gptq(THREE, ranges="mse", refinements=3),),
    "rotated gptq3": (*ROTATED, Gptq(THREE)),
    "rotated rtn3": (*ROTATED, rtn(THREE)),
    "w3": (GPTQ3,),
    "w2": (GPTQ2,),
    "outliers + gptq3": (SplitOutliers("hessian", "0.5%"), Gptq(THREE)),
    "low rank + gptq3": (SplitLowRank("rank4", whiten=True), Gptq(THREE)),
}  # fmt: skip
"""What is measured, by name; the head stays in 16 bits everywhere."""


COMPLETE: dict[str, Pipeline] = {
    **{f"{name} complete": Pipeline(RECIPES[name].calibrated or RECIPES[name].passes)
       for name in ("w4", "w4a16", "w3", "w2")},
    **{f"{name} rounded": RECIPES[name].pipeline for name in ("w8", "w4", "w3_rtn")},
}  # fmt: skip
"""Recipes as they are compiled, with their heads, tables and activations."""


@dataclass(frozen=True)
class Claim:
    """A sentence of a recipe: configurations from the least perplexity to the largest, every two
    neighbours strictly; with `ratios`, (worse, better) pairs whose quotients fall; with `stored`,
    bits that fall in place of perplexities that rise."""

    recipe: str
    text: str
    order: tuple[str, ...] = ()
    ratios: tuple[tuple[str, str], ...] = ()
    stored: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The configurations that it takes."""
        return tuple(dict.fromkeys((*self.order, *(name for pair in self.ratios for name in pair))))

    def figures(self, results: Mapping[str, Mapping[str, Any]]) -> list[float]:
        """Return the numbers that must rise."""
        if self.ratios:
            values = {name: results[name]["perplexity"] for name in self.names}
            return [-values[worse] / values[better] for worse, better in self.ratios]
        if self.stored:
            return [results[name]["bits"]["blocks"] for name in self.order]
        return [results[name]["perplexity"] for name in self.order]


CLAIMS = (
    Claim("gptq", "3 bits, g64: gptq < rtn in perplexity", ("gptq3", "rtn3")),
    Claim("gptq", "3 bits, g64: gptq with act-order < gptq without", ("gptq3", "gptq3 in order")),
    Claim(
        "gptq", "the gap between rtn and gptq is larger at 3 bits than at 4",
        ratios=(("rtn3", "gptq3"), ("rtn4", "gptq4")),
    ),
    Claim("awq", "3 bits, g64: awq < rtn in perplexity", ("awq3", "rtn3")),
    Claim(
        "awq", "3 bits, g64: awq < awq without clipping in perplexity", ("awq3", "awq3 scales")
    ),
    Claim("spqr", "3 bits: spqr < gptq with groups of 32 in perplexity", ("spqr", "gptq3 g32")),
    Claim(
        "spqr", "3 bits: spqr with outliers < spqr without", ("spqr", "spqr without outliers")
    ),
    Claim("spqr", "a smaller tau keeps more outliers", ("spqr", "spqr tau 0.1"), stored=True),
    Claim(
        "squeezellm", "3 bits a row: weighted tables < plain k-means < rtn in perplexity",
        ("squeezellm3 dense", "squeezellm3 plain", "rtn3 row"),
    ),
    Claim(
        "squeezellm", "3 bits a row: tables with 0.45% sparse < tables alone",
        ("squeezellm3", "squeezellm3 dense"),
    ),
    Claim(
        "claq", "3 bits: column tables < gptq a row in perplexity", ("claq3 tables", "gptq3 row")
    ),
    Claim(
        "claq", "3 bits: with wide columns and outliers < column tables alone",
        ("claq3", "claq3 tables"),
    ),
    Claim(
        "adadim", "3 bits, g64: the better axis < rtn in perplexity", ("adadim3 nearest", "rtn3")
    ),
    Claim("adadim", "3 bits, g64: the better axis + gptq < gptq", ("adadim3", "gptq3")),
    Claim("smoothquant_plus", "3 bits, g64: smoothquant_plus < rtn in perplexity",
          ("smoothquant+3", "rtn3")),
    Claim(
        "lorc", "3 bits, g64: lorc with rank 32 < lorc with rank 8 < rtn in perplexity",
        ("lorc3 rank 32", "lorc3 rank 8", "rtn3"),
    ),
    Claim(
        "gwq", "3 bits, g64: gwq < random outliers < rtn in perplexity",
        ("gwq3", "gwq3 random", "rtn3"),
    ),
    Claim("gwq", "3 bits, g64: gwq < outliers by magnitude", ("gwq3", "gwq3 magnitude")),
    Claim(
        "svdquant", "4 bits, g64, 4-bit activations: svdquant < smoothing alone < rtn",
        ("svdquant", "w4a4 smoothed", "w4a4"),
    ),
    Claim(
        "svdquant", "4 bits, g64, 4-bit activations: svdquant < the branch alone",
        ("svdquant", "svdquant without smoothing"),
    ),
    Claim(
        "svdquant_a16", "4 bits, g64: svdquant_a16 < rtn in perplexity",
        ("svdquant a16", "rtn4 symmetric"),
    ),
    Claim("w3", "w3 < gptq with 3 bits, g64", ("w3", "gptq3")),
    Claim("w3", "w3 < awq with 3 bits, g64", ("w3", "awq3")),
    Claim("w3", "w3 < claq at 3.64 bits", ("w3", "claq3")),
    Claim("w3", "w3 < spqr at 4.33 bits", ("w3", "spqr")),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What became of a claim: the numbers of every seed, and whether all of them agree with it."""

    claim: Claim
    figures: tuple[tuple[float, ...], ...]

    @property
    def holds(self) -> bool:
        """Say whether the numbers rise strictly, with every seed."""
        return all(a < b for row in self.figures for a, b in pairwise(row))

    def __str__(self) -> str:
        rows = "; ".join(" < ".join(f"{abs(value):.2f}" for value in row) for row in self.figures)
        word = "holds" if self.holds else "FAILS"
        return f"{word} {self.claim.recipe}: {self.claim.text} [{rows}]"


CAUSES: dict[str, str] = {}
"""Claims that do not reproduce, and why."""

UNMEASURED: frozenset[str] = frozenset()
"""Claims that no recorded result decides yet."""


def needs_data(name: str) -> bool:
    """Say whether a configuration looks at calibration data."""
    return any(not isinstance(one, DATA_FREE) for one in CONFIGURATIONS[name])


def decide(results: Iterable[Mapping[str, Any]]) -> list[Verdict]:
    """Return what became of every claim whose configurations are all there, with some seed."""
    seeds: dict[int, dict[str, Mapping[str, Any]]] = {}
    for result in results:
        seeds.setdefault(result["seed"], {})[result["name"]] = result
    for known in list(seeds.values()):
        free = {name: known[name] for name in known if name in CONFIGURATIONS}
        for name, result in free.items():
            if not needs_data(name):
                for others in seeds.values():
                    others.setdefault(name, result)
    found = []
    for claim in CLAIMS:
        known = [seeds[seed] for seed in sorted(seeds) if seeds[seed].keys() >= set(claim.names)]
        if known:
            found.append(Verdict(claim, tuple(tuple(claim.figures(each)) for each in known)))
    return found


def whole(passes: Sequence[Pass]) -> Pipeline:
    """Return the passes of a configuration between those that all have: tables, cache and head in
    16 bits."""
    return Pipeline((*TABLES_16, *passes, *AFTER))
