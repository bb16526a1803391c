"""Compositions of passes as data: what may be combined, and what of it a search tries.

A search starts from one composition and changes one thing at a time; the changes that helped are
then added one after the other, the best first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qc.ir.weights.notation import parse_weights
from qc.passes.decompose.low_rank import SplitLowRank
from qc.passes.decompose.outliers import SplitOutliers
from qc.passes.pipeline import Pass
from qc.passes.quantize.gptq import Gptq
from qc.passes.quantize.round_to_nearest import resized
from qc.passes.transform.awq import AwqScales
from qc.passes.transform.fold_scales import FoldScales
from qc.passes.transform.rotate_heads import RotateHeads
from qc.passes.transform.rotate_inputs import RotateInputs
from qc.passes.transform.rotate_stream import RotateStream


@dataclass(frozen=True)
class Composition:
    """Transforms, a decomposition, and GPTQ with what goes beyond the paper."""

    format: str
    rotated: str = ""
    """"", "stream" (and heads: no cost at run time) or "down" (and online in front of these)."""

    scaled: bool = False
    """AWQ's scales in front."""

    outliers: str = ""
    """A share of the weights in float16, by w^2 H_ii."""

    rank: int = 0
    damping: float = 0.01
    refinements: int = 1
    repair: float = 0.0
    wider: tuple[str, ...] = ()
    """Selectors of linears that get one bit more."""

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes, in their order."""
        found: list[Pass] = []
        if self.rotated:
            found += [RotateStream(), RotateHeads()]
        if self.rotated == "down":
            found.append(RotateInputs("down_proj"))
        if self.scaled:
            found += [AwqScales(self.format), FoldScales()]
        if self.outliers:
            found.append(SplitOutliers("hessian", self.outliers))
        if self.rank:
            found.append(SplitLowRank(f"rank{self.rank}", whiten=True))
        exceptions = tuple((selector, self.wider_format) for selector in self.wider)
        found.append(
            Gptq(
                self.format, damping=self.damping, ranges="mse", refinements=self.refinements,
                repair=self.repair, exceptions=exceptions,
            )
        )  # fmt: skip
        return tuple(found)

    @property
    def wider_format(self) -> str:
        """The format with one bit more a code."""
        format = parse_weights(self.format)
        bits = int(self.format.removeprefix("int")[0])
        return str(resized(format, bits + 1, None))

    def with_changes(self, changes: Sequence[Mapping[str, Any]]) -> Composition:
        """Return the composition with several changes; later ones win."""
        found = self
        for change in changes:
            found = replace(found, **change)
        return found


def nested(bits: int, group: int, scale: int, minimum: int) -> str:
    """Name the format of codes whose scales and minima are codes in their turn, a scale a row."""
    return f"int{bits}·g{group}·min·scale(uint{scale}·row)·minimum(uint{minimum}·row)"


VALUES_AND_OUTPUTS = "re:(v|o)_proj$"
KEYS_AND_VALUES = "re:(k|v)_proj$"
VALUES, OUTPUTS = "re:v_proj$", "re:o_proj$"

CHANGES: dict[str, Mapping[str, Any]] = {
    "half repair": {"repair": 0.5},
    "whole repair": {"repair": 1.0},
    "scaled": {"scaled": True},
    "rotated": {"rotated": "stream"},
    "rotated down": {"rotated": "down"},
    "damping 0.001": {"damping": 0.001},
    "damping 0.1": {"damping": 0.1},
    "no refinement": {"refinements": 0},
    "three refinements": {"refinements": 3},
}
"""What is changed whatever the bits."""

STARTS = {
    4: Composition(nested(4, 32, 8, 8)),
    3: Composition(nested(3, 32, 6, 6)),
    2: Composition(nested(2, 32, 6, 6)),
}

FORMATS: dict[int, dict[str, Mapping[str, Any]]] = {
    4: {
        "plain g32": {"format": "int4·g32·min"},
        "plain g64": {"format": "int4·g64·min"},
        "g64": {"format": nested(4, 64, 8, 8)},
        "zero g64": {"format": "int4·g64·zero"},
    },
    3: {
        "g64": {"format": nested(3, 64, 6, 6)},
        "g16": {"format": nested(3, 16, 3, 4)},
        "g24": {"format": nested(3, 24, 4, 4)},
        "plain g64": {"format": "int3·g64·min"},
        "tables": {"format": "lookup3·row", "refinements": 0},
        "g64, outliers": {"format": nested(3, 64, 6, 6), "outliers": "0.5%"},
        "g64, rank 4": {"format": nested(3, 64, 6, 6), "rank": 4},
        "g64, wider values and outputs": {
            "format": nested(3, 64, 6, 6), "wider": (VALUES_AND_OUTPUTS,),
        },
        "g64, wider keys and values": {
            "format": nested(3, 64, 6, 6), "wider": (KEYS_AND_VALUES,),
        },
        "g64, wider ends": {
            "format": nested(3, 64, 6, 6), "wider": (r"re:layers\.(0|1|28|29)\.", ),
        },
        "g64, half of wider down": {
            "format": nested(3, 64, 6, 6), "wider": (r"re:layers\.\d*[02468]\..*down_proj$",),
        },
    },
    2: {
        "g16": {"format": nested(2, 16, 4, 4)},
        "g24": {"format": nested(2, 24, 6, 6)},
        "finer scales": {"format": nested(2, 32, 8, 8)},
        "outliers": {"outliers": "0.3%"},
        "rank 2": {"rank": 2},
        "wider values and outputs": {"wider": (VALUES_AND_OUTPUTS,)},
        "wider keys and values": {"wider": (KEYS_AND_VALUES,)},
        "wider values": {"wider": (VALUES,)},
        "wider outputs": {"wider": (OUTPUTS,)},
        "half of wider down": {"wider": (r"re:layers\.\d*[02468]\..*down_proj$",)},
        "wider ends": {"wider": (r"re:layers\.(0|1|28|29)\.",)},
        "g64, wider down": {"format": nested(2, 64, 6, 6), "wider": ("re:down_proj$",)},
        "g64, wider values and outputs": {
            "format": nested(2, 64, 6, 6), "wider": (VALUES_AND_OUTPUTS,),
        },
        "tables": {"format": "lookup2·row", "refinements": 0},
    },
}  # fmt: skip
"""What is changed at so many bits a code: formats, and what is stored apart."""
