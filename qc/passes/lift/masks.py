"""Turn attention masks that follow from the sizes alone into attributes of the attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import rewrite
from qc.ir.types import bind_dim
from qc.passes.lift.attention import HIDDEN
from qc.passes.lift.size_functions import (
    SizeFunctions,
    Trial,
    constants_of,
    sequence_symbols,
)
from qc.passes.pipeline import Context, Pass


@dataclass(frozen=True)
class Pattern:
    """A hypothesis about a mask: everything is visible, what is not later, or a window of that."""

    causal: bool = False
    window: int | None = None
    constant: int | None = None

    def in_trial(self, trial: Trial) -> ops.Attention:
        """Return an attention with this pattern as it is in a trial."""
        window = self.window
        if window is not None and self.constant is not None:
            window += trial.constant(self.constant) - self.constant
        return ops.Attention(1.0, self.causal, window)


@dataclass(frozen=True)
class LiftMasks(Pass):
    """Replace masks that are functions of the sizes by what they hide.

        attention(q, k, v, le(arange[1, seq], arange[seq, 1]))  -->  attention(q, k, v) causal

    What a mask hides is decided by evaluating it at several sizes and comparing it with the
    patterns that Attention knows; windows are tried for every constant in the mask. A mask that
    fits none stays. Exact. Windows: Beltagy et al. 2020, section 3.1.
    """

    name: ClassVar[str] = "lift_masks"

    def run(self, graph: Graph, context: Context) -> Graph:
        attentions = [n for n in graph.nodes if isinstance(n.op, ops.Attention)]
        sequence = sequence_symbols(i.tensor.shape[1] for n in attentions for i in n.inputs[:3])
        functions = SizeFunctions(sequence, {})
        explained: dict[tuple[object, ...], Pattern | None] = {}

        def lift_mask(node: Node) -> Node | None:
            if not isinstance(node.op, ops.Attention) or len(node.inputs) != 4:
                return None
            q, k, v, mask = node.inputs
            key = (mask, q.tensor.shape[1], k.tensor.shape[1])
            if key not in explained:
                explained[key] = explain_mask(node, functions)
            pattern = explained[key]
            return (
                None
                if pattern is None
                else make(merge(node.op, pattern), q, k, v, origin=node.origin)
            )

        return rewrite(graph, (lift_mask,), self.name)


def merge(op: ops.Attention, pattern: Pattern) -> ops.Attention:
    """Add a pattern to what an attention hides already."""
    windows = [w for w in (op.window, pattern.window) if w is not None]
    causal = op.causal or pattern.causal
    return replace(op, causal=causal, window=min(windows, default=None))


def explain_mask(attention: Node, functions: SizeFunctions) -> Pattern | None:
    """Return the first pattern that agrees with the mask in every trial."""
    q, k, _, mask = attention.inputs
    trials = functions.trials(mask) if functions.contains(mask) else None
    if trials is None:
        return None
    observed: list[tuple[Trial, Tensor, int, int]] = []
    for trial in trials:
        value = functions.value(mask, trial)
        visible = visible_in(value) if value is not None else None
        if visible is None:
            return None
        seq, total = (bind_dim(x.tensor.shape[1], dict(trial.sizes)) for x in (q, k))
        observed.append((trial, visible, seq, total))
    for pattern in patterns_for(attention):
        if all(agrees(pattern, *each) for each in observed):
            return pattern
    return None


def patterns_for(attention: Node) -> list[Pattern]:
    """List the hypotheses, from the simplest on."""
    q, k, _, mask = attention.inputs
    if q.tensor.shape[1] != k.tensor.shape[1]:
        return [Pattern()]
    windows = [
        Pattern(True, constant + more, constant)
        for constant in sorted(constants_of(mask))
        for more in (0, 1, -1)
    ]
    return [Pattern(), Pattern(causal=True), *windows]


def agrees(pattern: Pattern, trial: Trial, visible: Tensor, seq: int, total: int) -> bool:
    """Say whether the mask shows exactly what the pattern does, in every batch and head."""
    expected = pattern.in_trial(trial).visible(seq, total)
    if visible.shape[-2:] not in ((seq, total), (1, total), (seq, 1), (1, 1)):
        return False
    return bool((visible == expected).all())


def visible_in(value: Tensor) -> Tensor | None:
    """Read a bool mask, or an additive one of zeros and numbers that hide; None otherwise."""
    if value.ndim < 2:
        return None
    if value.dtype == torch.bool:
        return value
    if not value.dtype.is_floating_point:
        return None
    hidden = value <= max(HIDDEN, torch.finfo(value.dtype).min)
    return ~hidden if bool((hidden | (value == 0)).all()) else None
