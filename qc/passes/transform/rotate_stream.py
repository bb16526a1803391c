"""Rotations of residual streams, folded into everything that writes and reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.hadamard import factor_for, rotate
from qc.ir.node import Node, make
from qc.ir.rewrite import substitute
from qc.ir.threads import side_by_side
from qc.passes.pipeline import Context, Pass
from qc.passes.stage import CANONICAL, Stage
from qc.passes.transform.flow import stored_values
from qc.passes.transform.fold_gains import FoldGains
from qc.passes.transform.linears import storing
from qc.passes.transform.stream import Stream, streams

NAME = "rotate_stream"

Map = Callable[[Tensor], Tensor]
"""Vectors [..., channels] -> the same vectors in another basis, in the dtype given."""


def random_hadamard(channels: int, seed: int) -> Map:
    """Return x -> x diag(+-1) H with random signs, in float64. Orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (channels,), generator=generator).double() * 2 - 1
    factor = factor_for(channels).double()
    return lambda x: rotate(x.double() * signs, factor, channels)


@dataclass(frozen=True)
class RotateStream(Pass):
    """Rotate the residual stream by a random Hadamard matrix R, so that no channel stands out.

        %x = embedding(%ids, %t)                  %x = embedding(%ids, %t R)
        %y = linear(rms_norm(%x, %g), %w)    -->  %y = linear(rms_norm(%x, 1), %w diag(%g) R)
        add(%x, linear(%y, %v, %b))               add(%x, linear(%y, R^T %v, %b R))

    Costs nothing at run time. The stream is found by what touches it; one that anything but
    linears, embeddings, sums and norms touches stays, and so does one with a table of fewer than 16
    bits: tables are stored behind this pass. Layer norms become RMS norms, once all that
    is written has mean zero: W - mean(W), and so do embeddings and biases.
    Exact: R is orthogonal, so |x R| = |x| and (x R)(W R)^T = x W^T. QuaRot (Ashkboos et al. 2024),
    section 4; SliceGPT (Ashkboos et al. 2024), section 3, for norms and means.
    """

    name: ClassVar[str] = NAME
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = CANONICAL
    seed: int = 0

    def preview(self, graph: Graph) -> Graph:
        """Return the graph itself: formats and shapes of matrices stay."""
        return graph

    def run(self, graph: Graph, context: Context) -> Graph:
        folded = FoldGains().run(graph, context)
        found = [(stream, random_hadamard(stream.channels, self.seed))
                 for stream in streams(folded) if is_centred_or_needs_not(stream)]  # fmt: skip
        return turned(folded, found) if found else graph


def is_centred_or_needs_not(stream: Stream) -> bool:
    """Say whether every value may be shifted along 1, or no norm asks for it: layer norms alone
    read the stream then, and their results sum to zero."""
    if not any(isinstance(norm.op, ops.LayerNorm) for norm in stream.norms):
        return True
    return all(norm.inputs[0] not in stream.norms for norm in stream.norms) and all(
        behind_norm(reader.inputs[0], stream) for reader in stream.readers
    )


def behind_norm(value: Node, stream: Stream) -> bool:
    """Say whether a value of the stream is a norm's, moved at most."""
    while value not in stream.norms and len(value.inputs) == 1:
        value = value.inputs[0]
    return value in stream.norms


def turned(graph: Graph, found: list[tuple[Stream, Map]]) -> Graph:
    """Return the graph with its streams in other bases."""
    replacements: dict[Node, Node] = {}
    for stream, turn in found:
        centred = any(isinstance(norm.op, ops.LayerNorm) for norm in stream.norms)
        changed = partial(in_basis, stream, turn, written(turn, centred), replacements)
        nodes = sorted(stream.writers | stream.readers, key=graph.positions.__getitem__)
        replacements |= dict(side_by_side(changed, nodes))
        for norm in stream.norms if centred else ():
            op = ops.RMSNorm(norm.op.eps) if isinstance(norm.op, ops.LayerNorm) else norm.op
            replacements[norm] = make(op, *norm.inputs[:2], origin=norm.origin.touched_by(NAME))
    return substitute(graph, replacements)


def in_basis(
    stream: Stream, turn: Map, write: Map, replacements: Mapping[Node, Node], node: Node
) -> Node:
    """Return a node that takes part in a turned stream. A linear may read one stream and write
    another, or the same."""
    current = replacements.get(node, node)
    if node in stream.readers:
        current = read_by(current, turn)
    return written_by(current, write) if node in stream.writers else current


def written(turn: Map, centred: bool) -> Map:
    """Return what happens to vectors that enter a stream."""
    if not centred:
        return turn
    return lambda x: turn(x.double() - x.double().mean(-1, keepdim=True))


def read_by(linear: Node, turn: Map) -> Node:
    """Return a linear that reads the turned stream."""
    x, weight, *rest = linear.inputs
    turned_weight = storing(weight, turn(stored_values(weight)))
    return make(linear.op, x, turned_weight, *rest, origin=linear.origin.touched_by(NAME))


def written_by(node: Node, write: Map) -> Node:
    """Return a linear, an embedding or a stored vector that writes to the turned stream."""
    origin = node.origin.touched_by(NAME)
    if isinstance(node.op, ops.Parameter):
        return storing(node, write(stored_values(node)))
    if isinstance(node.op, ops.Embedding):
        ids, table = node.inputs
        return make(node.op, ids, storing(table, write(stored_values(table))), origin=origin)
    x, weight, *biases = node.inputs
    columns = write(stored_values(weight).double().T).T
    rest = [storing(bias, write(stored_values(bias))) for bias in biases]
    return make(node.op, x, storing(weight, columns), *rest, origin=origin)
