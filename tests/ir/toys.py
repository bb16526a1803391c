"""A decoder of one block, drawn by hand: small enough to read, with every kind of weight."""

from __future__ import annotations

import torch
from torch import Tensor

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, Origin, make
from qc.ir.types import Dim, TensorType, symbol
from qc.ir.weights.dense import dense_weight

BATCH, SEQ = symbol("batch"), symbol("seq")
VOCABULARY, CHANNELS, HEADS, GROUPS, DIM, HIDDEN = 11, 48, 4, 2, 12, 40


class Block:
    """The parts of the toy; `graph` is the whole."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.ids = make(ops.Input("ids", TensorType((BATCH, SEQ), torch.int64)))
        self.table = self.weight("embed", VOCABULARY, CHANNELS)

    def weight(self, name: str, *shape: int) -> Node:
        values = 0.3 * torch.randn(shape, generator=self.generator)
        parameter = ops.Parameter(dense_weight(f"{name}.weight", values))
        return make(parameter, origin=Origin(name))

    def linear(self, name: str, x: Node, out: int) -> Node:
        inputs = x.tensor.shape[-1]
        assert isinstance(inputs, int)
        weight = self.weight(name, out, inputs)
        return make(ops.Linear(), x, weight, origin=Origin(name))

    def norm(self, name: str, x: Node) -> Node:
        gain = self.weight(name, CHANNELS)
        return make(ops.RMSNorm(1e-6), x, gain, origin=Origin(name))

    def heads(self, name: str, x: Node, count: int) -> Node:
        shape: tuple[Dim, ...] = (BATCH, SEQ, count, DIM)
        return make(ops.Reshape(shape), self.linear(name, x, count * DIM))

    def attention(self, x: Node) -> Node:
        angles = self.angles()
        cos, sin = (make(ops.Unary(kind), angles) for kind in ("cos", "sin"))
        q, k = (
            make(ops.Rope(), self.heads(name, x, count), cos, sin)
            for name, count in (("q", HEADS), ("k", GROUPS))
        )
        v = self.heads("v", x, GROUPS)
        mixed = make(ops.Attention(DIM**-0.5, causal=True), q, k, v)
        return self.linear("o", make(ops.Reshape((BATCH, SEQ, HEADS * DIM)), mixed), CHANNELS)

    def angles(self) -> Node:
        positions = make(ops.Cast(torch.float32), make(ops.Arange(SEQ)))
        column = make(ops.Reshape((1, SEQ, 1)), positions)
        return make(ops.Binary("mul"), column, self.weight("frequencies", DIM))

    def feed_forward(self, x: Node) -> Node:
        gate, up = self.linear("gate", x, HIDDEN), self.linear("up", x, HIDDEN)
        return self.linear("down", make(ops.GatedActivation("silu"), gate, up), CHANNELS)

    def graph(self) -> Graph:
        x = make(ops.Embedding(), self.ids, self.table, origin=Origin("embed"))
        x = make(ops.Binary("add"), x, self.attention(self.norm("norm1", x)))
        x = make(ops.Binary("add"), x, self.feed_forward(self.norm("norm2", x)))
        head = make(ops.Linear(), self.norm("norm3", x), self.table, origin=Origin("head"))
        return Graph((self.ids,), (head,), ("logits",))


def block_graph(seed: int = 0) -> Graph:
    """Return the toy: embedding, attention, gated feed-forward, tied head."""
    return Block(seed).graph()


def some_ids(batch: int = 2, seq: int = 5) -> dict[str, Tensor]:
    """Return token ids for the toy."""
    return {"ids": torch.randint(0, VOCABULARY, (batch, seq))}
