"""AdaDim: groups along the inputs or along the outputs, whichever serves a matrix better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from qc.errors import FormatError
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.weights.weight import Term, TermFormat
from qc.passes.quantize.error_feedback import Curvature, output_error
from qc.passes.quantize.gptq import Gptq

Values = Literal["error feedback", "nearest"]


def better_axis(
    values: Tensor, hessian: Tensor, along_inputs: TermFormat, along_outputs: TermFormat
) -> TermFormat:
    """Return the format that loses less when a matrix [out, in] is rounded to it:
    tr((W - Q) H (W - Q)^T). AdaDim, section 3.2, with the output of the linear as criterion."""

    def loss(format: TermFormat) -> float:
        difference = values - format.nearest(values).dense().float()
        return output_error(difference.T, hessian)

    return along_outputs if loss(along_outputs) < loss(along_inputs) else along_inputs


@dataclass(frozen=True)
class AdaptiveAxis(Gptq):
    """Store the weights of linears in groups along the axis that loses less.

        linear(%x, dense f32)  -->  linear(%x, int3·g128·zero)  or  linear(%x, int3·o128·zero)

    Lossy: minimises ||X W^T - X Q^T||^2; the axis is chosen by rounding to the nearest, the values
    by error feedback (`values="nearest"`: not). Heo et al. 2023 (AdaDim), section 3: groups along
    the outputs, inside one input channel, keep a channel with outliers to themselves.
    """

    name: ClassVar[str] = "adaptive_axis"
    format: str = "int3·g128·zero"
    values: Values = "error feedback"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.weights.terms) != 1 or self.weights.terms[0].turned() is None:
            raise FormatError(f"{self.format} has no axis to choose: int3·g128·zero has")

    def preview(self, graph: Graph) -> Graph | None:
        return None  # the axis depends on the values

    def store(self, values: Tensor, prepared: Curvature, parameter: Node) -> tuple[Term, ...]:
        along = self.weights.terms[0]
        across = along.turned()
        assert across is not None
        chosen = better_axis(values, prepared.hessian.float(), along, across)
        if self.values == "nearest":
            return (chosen.nearest(values),)
        return (self.store_term(chosen, values, prepared),)
