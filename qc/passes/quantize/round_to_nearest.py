"""Round-to-nearest: the grid of every group spans its weights; every weight takes the nearest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qc.errors import ModelError
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.quantized import split_groups
from qc.ir.rewrite import substitute
from qc.ir.threads import side_by_side
from qc.ir.weights.grouped import Grouped, GroupedFormat, encode_codes
from qc.ir.weights.weight import Term, Weight
from qc.passes.pipeline import Context, Pass
from qc.passes.stage import CANONICAL, QUANTIZED, Stage

ROWS_AT_ONCE = 4096
"""Rows quantized together: bounds the float32 copies to some hundred MB for wide matrices."""


def round_to_nearest(weight: Tensor, layout: GroupedFormat) -> Grouped:
    """Store weight [out, in] on the grid of `layout`, chosen per group from its extremes.

    symmetric: s = max|w| / (2^(b-1) - 1); minimum: s = (max - min) / (2^b - 1), m = min; zero: the
    same with 0 inside the range and z = round(-min / s). Codes are computed with the scale and the
    offset as they are stored (float16), so that storing them costs nothing more.
    """
    parts = [round_rows(rows, layout) for rows in weight.split(ROWS_AT_ONCE)]
    first, others = parts[0], parts[1:]
    return first.stacked(others) if others else first


def round_rows(weight: Tensor, layout: GroupedFormat) -> Grouped:
    """Quantize some rows."""
    top = (1 << layout.bits_per_code) - 1
    groups, low, high = grouped_extremes(weight.float(), layout.group)
    offset: Tensor | None = None
    if layout.offset == "symmetric":
        middle = (top + 1) // 2
        scale = storable(torch.maximum(-low, high) / max(1, middle - 1))
        codes = (groups / scale.float().unsqueeze(-1)).round() + middle
    elif layout.offset == "zero":
        low, high = low.clamp_max(0), high.clamp_min(0)
        scale = storable((high - low) / top)
        offset = (-low / scale.float()).round().clamp(0, top)
        codes = (groups / scale.float().unsqueeze(-1)).round() + offset.unsqueeze(-1)
    else:
        offset = low.to(torch.float16)
        scale = storable((high - offset.float()) / top)
        codes = ((groups - offset.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)).round()
    kept = codes.clamp(0, top).to(torch.uint8).flatten(1)[:, : weight.shape[1]]
    return encode_codes(layout, kept, scale, offset)


def grouped_extremes(weight: Tensor, group: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the groups [out, groups, size] and their minima and maxima, padding left out."""
    groups, size = split_groups(weight, group)
    tail = weight.shape[1] % size
    if not tail:
        return groups, groups.amin(-1), groups.amax(-1)
    low, high = groups.amin(-1), groups.amax(-1)
    low[:, -1], high[:, -1] = groups[:, -1, :tail].amin(-1), groups[:, -1, :tail].amax(-1)
    return groups, low, high


def storable(scale: Tensor) -> Tensor:
    """Round a scale to float16; a group of equal weights gets scale 1, whose code 0 is exact."""
    rounded = scale.to(torch.float16)
    return torch.where(rounded > 0, rounded, torch.ones_like(rounded))


@dataclass(frozen=True)
class RoundToNearest(Pass):
    """Store the weight of every linear as grouped integer codes.

        %w = weight dense f32    -->  %w = weight int4·g32·min
        linear(%x, %w)                linear(%x, %w)

    Lossy: minimises the error of each weight by itself. A table that an embedding shares with a
    linear stays as it is for the embedding.
    """

    name: ClassVar[str] = "round_to_nearest"
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = QUANTIZED
    exact: ClassVar[bool] = False
    format: GroupedFormat

    def run(self, graph: Graph, context: Context) -> Graph:
        linears = list(quantizable_linears(graph))
        parameters = list(dict.fromkeys(linear.inputs[1] for linear in linears))
        quantized: dict[Node, Node] = {}
        for parameter, stored in side_by_side(self.quantize, parameters):
            quantized[parameter] = stored
            name = parameter_name(parameter)
            context.progress(f"quantize {name}", len(quantized) / len(parameters))
        replacements = {
            linear: make(
                linear.op,
                linear.inputs[0],
                quantized[linear.inputs[1]],
                *linear.inputs[2:],
                origin=linear.origin.touched_by(self.name),
            )
            for linear in linears
        }
        return substitute(graph, replacements)

    def quantize(self, parameter: Node) -> Node:
        """Return the parameter with its values rounded."""
        assert isinstance(parameter.op, ops.Parameter)
        weight = parameter.op.weight
        values = weight.dense()
        require_finite(values, weight)
        term = round_to_nearest(values, self.format)
        require_storable(term, weight)
        stored = Weight(weight.name, weight.shape, (term,), weight.dtype)
        return make(ops.Parameter(stored), origin=parameter.origin)


def require_finite(values: Tensor, weight: Weight) -> None:
    """Refuse NaN and infinities, which no grid holds."""
    wrong = values.numel() - int(torch.isfinite(values).sum())
    if wrong:
        raise ModelError(
            f"weight {weight.name!r} holds {wrong} values that are NaN or infinite, "
            "so it cannot be quantized"
        )


def require_storable(term: Term, weight: Weight) -> None:
    """Refuse weights so large that a scale or a minimum overflows where it is stored."""
    floats = (array for array in term.arrays().values() if array.is_floating_point())
    if not all(bool(torch.isfinite(array).all()) for array in floats):
        raise ModelError(
            f"weight {weight.name!r} reaches {float(weight.dense().abs().max()):.3g}, which the "
            f"scales of {term.format} cannot hold"
        )


def quantizable_linears(graph: Graph) -> Iterator[Node]:
    """Yield the linears whose weight is stored in 16 bits or more."""
    for node in graph.nodes:
        if not isinstance(node.op, ops.Linear):
            continue
        parameter = node.inputs[1].op
        if isinstance(parameter, ops.Parameter) and parameter.weight.bits_per_element >= 16:
            yield node


def parameter_name(parameter: Node) -> str:
    """Return the name of a stored tensor."""
    assert isinstance(parameter.op, ops.Parameter)
    return parameter.op.weight.name
