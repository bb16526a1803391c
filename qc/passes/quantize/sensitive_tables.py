"""SqueezeLLM: tables of values for each row, fitted where the loss feels it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qc.errors import FormatError
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.threads import side_by_side
from qc.ir.weights.parts import largest
from qc.ir.weights.sparse import SparseFormat, sparse_term
from qc.ir.weights.weight import Term, TermFormat, Weight
from qc.passes.calibration import Calibration, Coverage
from qc.passes.pipeline import Context
from qc.passes.quantize.calibrated import StoreByData, weight_of
from qc.passes.quantize.remainder import remainder, with_remainder
from qc.passes.quantize.round_to_nearest import require_storable


def sensitive_entries(values: Tensor, fisher: Tensor, entries: int, sensitive: int) -> Tensor:
    """Mark `entries` weights: the `sensitive` most sensitive ones, then the largest of the others.

    SqueezeLLM, section 4.2: values that the loss feels most, and values that stretch the table.
    """
    chosen = largest(fisher, min(sensitive, entries))
    rest = values.abs().masked_fill(chosen, -1.0)
    return chosen | largest(rest, entries - int(chosen.sum()))


def table_term(format: TermFormat, values: Tensor, weights: Tensor) -> Term:
    """Fit tables to a matrix [out, in] with the weighted squared error; a row without weights
    counts evenly."""
    rounding = format.rounding((values.shape[0], values.shape[1]))
    assert rounding is not None
    empty = weights.sum(1, keepdim=True) <= 0
    return rounding.nearest(values, torch.where(empty, 1.0, weights))


@dataclass(frozen=True)
class SensitiveTables(StoreByData):
    """Store the weights of linears as codes into tables that follow the Fisher information.

        %w = weight dense f32    -->  %w = weight lookup3·row + sparse0.45%
        linear(%x, %w)                linear(%x, %w)

    Lossy: minimises sum F_ij (w_ij - q_ij)^2, F the mean squared gradient of the loss over
    `samples` sequences, by k-means. Kim et al. 2023 (SqueezeLLM), sections 4.1 and 4.2. A sparse
    term takes `sensitive_per_million` of the weights by F, the rest of its room by magnitude; they
    count for nothing in the tables. `weighted=False` is plain k-means, to compare with.
    """

    name: ClassVar[str] = "sensitive_tables"
    format: str = "lookup3·row + sparse0.45%"
    sensitive_per_million: int = 500
    samples: int = 32
    weighted: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        terms = self.weights.terms
        sparse = [term for term in terms if isinstance(term, SparseFormat)]
        others = [term for term in terms if not isinstance(term, SparseFormat)]
        if len(sparse) > 1 or len(others) != 1 or others[0].rounding((64, 64)) is None:
            raise FormatError(
                f"sensitive tables are one term of codes and at most one sparse one, as in "
                f"lookup3·row + sparse0.45%, not {self.format}"
            )

    def stored(
        self, graph: Graph, linears: list[Node], calibration: Calibration, context: Context
    ) -> dict[Node, Weight]:
        parameters = list(dict.fromkeys(linear.inputs[1] for linear in linears))
        kept = calibration.checkpoint
        finished = {p: kept.read([p], calibration.coverage) if kept else None for p in parameters}
        missing = [p for p in parameters if finished[p] is None]
        felt = calibration.gradients(graph, missing, self.samples)
        seen = sum(len(each) for each in calibration.sequences()[: self.samples])

        def store(parameter: Node) -> Weight:
            known = finished[parameter]
            if known is not None:
                return known[parameter]
            weight = weight_of(parameter)
            terms = self.terms_of(remainder(weight).float(), felt[parameter].square)
            require_storable(terms, weight)
            return with_remainder(weight, terms)

        stored: dict[Node, Weight] = {}
        for parameter, weight in side_by_side(store, parameters):
            stored[parameter] = weight
            calibration.coverage[weight.name] = Coverage(seen)
            if kept is not None and finished[parameter] is None:
                kept.write([parameter], {parameter: weight}, calibration.coverage)
            context.progress(f"store {weight.name}", len(stored) / len(parameters))
        return stored

    def terms_of(self, values: Tensor, fisher: Tensor) -> tuple[Term, ...]:
        """Store a matrix [out, in] with F of the same shape."""
        shape = (values.shape[0], values.shape[1])
        chosen = torch.zeros(shape, dtype=torch.bool)
        for term in self.weights.terms:
            if isinstance(term, SparseFormat):
                entries = term.entries(shape)
                sensitive = -(-self.sensitive_per_million * values.numel() // 1_000_000)
                chosen = sensitive_entries(values, fisher, entries, sensitive)
        weights = (fisher if self.weighted else torch.ones(shape)).masked_fill(chosen, 0.0)
        table = next(t for t in self.weights.terms if not isinstance(t, SparseFormat))
        coded = table_term(table, values, weights)
        left = values - coded.dense().float()
        return tuple(
            sparse_term(term, left, chosen) if isinstance(term, SparseFormat) else coded
            for term in self.weights.terms
        )
