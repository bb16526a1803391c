"""Lift RMSNorm and LayerNorm out of their arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import rewrite
from qc.passes.lift.algebra import (
    as_vector,
    binary,
    either_order,
    inverse_root_of,
    is_filled,
    last_axis_mean,
    power,
    root_of,
    scalar_of,
)
from qc.passes.pipeline import Context, Pass


@dataclass(frozen=True)
class LiftNorms(Pass):
    """Recognise normalization over the last axis.

        x * rsqrt(mean(x^2) + eps) * gain                 -->  rms_norm(x, gain)
        rms_norm(x - mean(x), gain) + bias                -->  layer_norm(x, gain, bias)

    The gain may be missing, or stand before or after; the root may be a division or a power.
    Exact. Zhang and Sennrich 2019, eq. 4; Ba et al. 2016, eq. 4.
    """

    name: ClassVar[str] = "lift_norms"

    def run(self, graph: Graph, context: Context) -> Graph:
        return rewrite(graph, RULES, self.name)


def root_mean_square_of(moment: Node) -> tuple[Node, float] | None:
    """Return x and eps where `moment` is mean(x^2) + eps over the last axis."""
    for mean, constant in either_order(moment, "add"):
        eps, squared = scalar_of(constant), last_axis_mean(mean)
        raised = power(squared) if squared is not None else None
        if eps is not None and raised is not None and raised[1] == 2.0:
            return raised[0], eps
    return None


def normalized_by(node: Node) -> tuple[Node, Node, float] | None:
    """Return a, x and eps where `node` is a / sqrt(mean(x^2) + eps)."""
    for a, inverse in either_order(node, "mul"):
        moment = inverse_root_of(inverse)
        found = root_mean_square_of(moment) if moment is not None else None
        if found is not None:
            return a, *found
    quotient = binary(node, "div")
    moment = root_of(quotient[1]) if quotient is not None else None
    found = root_mean_square_of(moment) if moment is not None else None
    return None if quotient is None or found is None else (quotient[0], *found)


def lift_rms(node: Node) -> Node | None:
    """x / sqrt(mean(x^2) + eps) --> rms_norm(x, 1)"""
    found = normalized_by(node)
    if found is None or found[0] is not found[1]:
        return None
    _, x, eps = found
    return make(ops.RMSNorm(eps), x, filled(x, 1.0), origin=node.origin)


def lift_rms_gain_before(node: Node) -> Node | None:
    """(x * gain) / sqrt(mean(x^2) + eps) --> rms_norm(x, gain)"""
    found = normalized_by(node)
    if found is None:
        return None
    scaled, x, eps = found
    for factor, other in either_order(scaled, "mul"):
        gain = as_vector(other, x.tensor)
        if factor is x and gain is not None:
            return make(ops.RMSNorm(eps), x, gain, origin=node.origin)
    return None


def take_gain(node: Node) -> Node | None:
    """norm(x, 1) * gain --> norm(x, gain)"""
    for normed, other in either_order(node, "mul"):
        if not isinstance(normed.op, ops.RMSNorm | ops.LayerNorm):
            continue
        x, unit, *bias = normed.inputs
        gain = as_vector(other, x.tensor)
        if gain is not None and is_filled(unit, 1.0) and all(is_filled(b, 0.0) for b in bias):
            return make(normed.op, x, gain, *bias, origin=node.origin)
    return None


def lift_layer_norm(node: Node) -> Node | None:
    """rms_norm(x - mean(x), gain) --> layer_norm(x, gain, 0)"""
    if not isinstance(node.op, ops.RMSNorm):
        return None
    centered = binary(node.inputs[0], "sub")
    if centered is None or last_axis_mean(centered[1]) is not centered[0]:
        return None
    x = centered[0]
    bias = filled(x, 0.0)
    return make(ops.LayerNorm(node.op.eps), x, node.inputs[1], bias, origin=node.origin)


def take_bias(node: Node) -> Node | None:
    """layer_norm(x, gain, 0) + bias --> layer_norm(x, gain, bias)"""
    for normed, other in either_order(node, "add"):
        if not isinstance(normed.op, ops.LayerNorm) or not is_filled(normed.inputs[2], 0.0):
            continue
        bias = as_vector(other, normed.tensor)
        if bias is not None:
            return make(normed.op, *normed.inputs[:2], bias, origin=node.origin)
    return None


def filled(x: Node, value: float) -> Node:
    """Return a vector of one repeated value for the channels of `x`."""
    return make(ops.Full(x.tensor.shape[-1:], value, x.tensor.dtype))


RULES = (lift_rms, lift_rms_gain_before, take_gain, lift_layer_norm, take_bias)
