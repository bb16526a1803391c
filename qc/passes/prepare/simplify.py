"""Remove what has no effect, merge what is one, compute what is known, share what is equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.rewrite import Rule, rewrite
from qc.passes.pipeline import Context, Pass
from qc.passes.prepare.aten import translate
from qc.passes.prepare.constants import fold
from qc.passes.prepare.identities import IDENTITIES
from qc.passes.prepare.sharing import share


def translate_again(node: Node) -> Node | None:
    """An ATen call that has a translation now that its operands are simple."""
    if not isinstance(node.op, ops.Torch | ops.Item):
        return None
    translated = translate(node)
    return None if translated is node else translated


RULES: tuple[Rule, ...] = (*IDENTITIES, fold, translate_again)


@dataclass(frozen=True)
class Simplify(Pass):
    """Apply the rules of `identities` and `constants`, then compute equal values once.

        reshape[batch, seq, 64](reshape[batch * seq, 64](%x)) --> %x
        mul(%x, add(%gain, 1.0))                              --> mul(%x, %gain')
        cos(%a), cos(%a)                                      --> cos(%a), the same node

    Exact.
    """

    name: ClassVar[str] = "simplify"

    def run(self, graph: Graph, context: Context) -> Graph:
        return share(rewrite(share(graph), RULES))
