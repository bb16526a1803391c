"""The rule for linears: choose a kernel for each term, put them into one function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qc.backends.linear_region import LinearRegion, match_linear
from qc.backends.region import Region
from qc.backends.tvm.kernel import Kernel
from qc.backends.tvm.linear.amx import TALL, AmxStream, amx_term
from qc.backends.tvm.linear.arm_dot import arm_term
from qc.backends.tvm.linear.bit_factors import bit_factors_term
from qc.backends.tvm.linear.bit_serial import bit_serial_term
from qc.backends.tvm.linear.coded import coded_term
from qc.backends.tvm.linear.decoded import decoded_term
from qc.backends.tvm.linear.dense import dense_term
from qc.backends.tvm.linear.entries import entries_term
from qc.backends.tvm.linear.inputs import Inputs
from qc.backends.tvm.linear.int8_dot import CHAINED_TILES, INT8_TILES, Int8Stream, int8_term
from qc.backends.tvm.linear.int8_panels import PANEL_TILES, PanelStream, panel_stream
from qc.backends.tvm.linear.layout import BLOCK
from qc.backends.tvm.linear.panels import FLOAT_TILES
from qc.backends.tvm.linear.row_tables import row_tables_term
from qc.backends.tvm.linear.scalar import scalar_term
from qc.backends.tvm.linear.skeleton import (
    Signature,
    accumulator,
    build_kernel,
    choose_height,
    for_each_block,
    for_each_tile,
    store_sums,
    store_tile,
    zeros_in_memory,
)
from qc.backends.tvm.linear.stream_float import float_stream_term
from qc.backends.tvm.linear.structures import chain_term, selected_term
from qc.backends.tvm.linear.term import Place, TermKernel, TermRule
from qc.backends.tvm.linear.vectors import float_lanes
from qc.backends.tvm.linear.windows import windows_term
from qc.backends.tvm.linear.word_tables import word_tables_term
from qc.ir.node import Node
from qc.ir.weights.weight import WeightFormat

FAST_RULES: tuple[TermRule, ...] = (
    amx_term,
    int8_term,
    arm_term,
    dense_term,
    float_stream_term,
    entries_term,
    lambda place: chain_term(place, term_kernel),
    lambda place: selected_term(place, term_kernel),
    bit_serial_term,
    bit_factors_term,
    coded_term,
    row_tables_term,
    word_tables_term,
    windows_term,
    decoded_term,
)
"""From the most special; without any of them everything still works, slower."""


def term_kernel(place: Place) -> TermKernel:
    """Return how a term is multiplied: the first rule that takes it, or element by element."""
    for rule in FAST_RULES:
        found = rule(place)
        if found is not None:
            return found
    return scalar_term(place)


@dataclass(frozen=True)
class LinearKernels:
    """The kernels of all terms of all linears of a region."""

    linear: LinearRegion
    terms: Mapping[Node, Sequence[TermKernel]]

    @property
    def rule(self) -> str:
        """The names of the rules, for reports."""
        names = dict.fromkeys(kernel.rule for kernels in self.terms.values() for kernel in kernels)
        return "_".join(names)

    def declare(self, signature: Signature) -> None:
        """Declare the arrays of all weights."""
        for kernels in self.terms.values():
            for kernel in kernels:
                kernel.declare(signature)

    def emit(self, signature: Signature) -> None:
        """Emit the function's body."""
        inputs = signature.inputs()
        for kernels in self.terms.values():
            for kernel in kernels:
                kernel.prepare(signature, inputs)
        blocks = -(-self.linear.outer // BLOCK)

        def emit_blocks(height: int) -> None:
            emit_block = partial(self.emit_block, signature, inputs, height)
            for_each_block(signature, blocks, emit_block)

        choose_height(signature, (1, *self.tile_heights()), emit_blocks)

    def emit_block(self, signature: Signature, inputs: Inputs, height: int, block: Any) -> None:
        """Emit a block of 16 outputs of all rows, in tiles of `height` rows."""
        lanes = float_lanes(self.linear.region.target)
        terms = {node: [k.at_height(height) for k in ks] for node, ks in self.terms.items()}
        products = {
            node: [kernel.block(signature, inputs, block, height > 1) for kernel in kernels]
            for node, kernels in terms.items()
        }

        in_memory = any(kernel.sums_in_memory for kernels in terms.values() for kernel in kernels)

        def new_sums(height: int) -> list[Any]:
            if in_memory:
                return [zeros_in_memory(height * BLOCK, lanes)]
            return [accumulator(lanes) for _ in range(height)]

        def emit(row: Any, height: int) -> None:
            sums = {node: new_sums(height) for node in products}
            for node, added in products.items():
                for add in added:
                    add(row, height, sums[node])
            if in_memory:
                whole = {node: buffers[0] for node, buffers in sums.items()}
                store_sums(signature, whole, height, row, block, lanes)
            else:
                store_tile(signature, sums, row, block, lanes)

        for_each_tile(signature, height, emit)
        for kernels in terms.values():
            for kernel in kernels:
                kernel.finish()

    def tile_heights(self) -> tuple[int, ...]:
        """Return the rows of tiles, ascending: the usual ones, and those of AMX or of panels."""
        kernels = [kernel for kernels in self.terms.values() for kernel in kernels]
        if all(isinstance(kernel, PanelStream) for kernel in kernels):
            return PANEL_TILES
        chained = all(isinstance(kernel, Int8Stream) and kernel.chains for kernel in kernels)
        usual = CHAINED_TILES if chained else (self.tile_height(),)
        tall = any(isinstance(kernel, AmxStream) for kernel in kernels)
        return (*usual, TALL) if tall else usual

    def tile_height(self) -> int:
        """Return the rows of a tile: as many as the most demanding term keeps in registers."""
        size = self.linear.region.target.vector_bytes
        kernels = [kernel for kernels in self.terms.values() for kernel in kernels]
        tiles = [INT8_TILES if isinstance(k, Int8Stream) else FLOAT_TILES for k in kernels]
        return min(heights[size] for heights in tiles)


def choose_kernels(linear: LinearRegion) -> LinearKernels:
    """Choose how every term of a region is multiplied."""
    terms = {
        node: [term_kernel(place) for place in places_of(linear, node, format)]
        for node, format in zip(linear.linears, linear.formats, strict=True)
    }
    return LinearKernels(linear, with_panels(terms))


def with_panels(terms: dict[Node, list[TermKernel]]) -> dict[Node, list[TermKernel]]:
    """Let a kernel that is nothing but products of bytes take tiles of many rows."""
    panels = {node: [panel_stream(kernel) for kernel in terms[node]] for node in terms}
    found = {node: [p for p in each if p is not None] for node, each in panels.items()}
    fits = all(len(found[node]) == len(terms[node]) for node in terms)
    return {node: list(each) for node, each in found.items()} if fits else terms


def places_of(linear: LinearRegion, node: Node, format: WeightFormat) -> list[Place]:
    """Return the terms of the weight of one linear."""
    return [
        Place(
            linear.operand(node.inputs[1]),
            f"{number}.",
            term,
            (linear.outer, linear.inner),
            linear.region.target,
            linear.activation,
        )
        for number, term in enumerate(format.terms)
    ]


def linear_rule(region: Region) -> Kernel | None:
    """Multiply by stored matrices, then the epilogue: any sum of terms is one kernel."""
    linear = match_linear(region)
    if linear is None:
        return None
    kernels = choose_kernels(linear)
    return build_kernel(f"linear_{kernels.rule}", linear, kernels.declare, kernels.emit)
