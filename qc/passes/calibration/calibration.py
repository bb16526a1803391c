"""Calibration: the data that passes look at, and everything that is measured on it.

Statistics are the analyses of this compiler: asked for at a node, measured once, remembered as long
as the node lives. A node is immutable, so what was measured at it is never stale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qc.errors import InputError, QcError
from qc.ir import ops
from qc.ir.device import parse_device
from qc.ir.graph import Graph
from qc.ir.meaning import bind_symbols
from qc.ir.node import Node
from qc.ir.weights.weight import Weight
from qc.passes.calibration.checkpoint import Checkpoint
from qc.passes.calibration.coverage import Coverage
from qc.passes.calibration.data import Encode, Inputs, batched, read_data
from qc.passes.calibration.fisher import Gradients, squared_gradients
from qc.passes.calibration.generate import write_sequences
from qc.passes.calibration.schedule import LinearGroup, Step, linear_groups, plan_steps
from qc.passes.calibration.statistics import Drift, Statistic
from qc.passes.calibration.walk import Batch, Walk, advance_both

SELF = "self"

Sequencing = Literal["sequential", "independent"]
"""Whether a method sees the errors of the weights that it has stored already."""

Report = Callable[[str, float], None]
Known = Mapping[tuple[Node, Statistic], Any]
Visit = Callable[[LinearGroup, Known], Mapping[Node, Weight]]
"""Group and its measurements -> the weights to store in place of its parameters."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Data, and how much of it: `num_calibration_samples` sequences of `max_seq_length` tokens.

    `data` is "self" (the model writes its own text, drawn with `seed`), texts, token ids, a .txt or
    .jsonl file, or anything that yields texts, token ids or records. Models that read no tokens
    take records of their inputs by name, `{"pixel_values": tensor}`: one row of a batch is one
    sample. Data is taken from the front. `device` is where the model runs over it: "cpu", "cuda",
    "cuda:1", or "auto", a GPU where torch has one. `bound` adds what only a model can say: how to
    tokenize, how to write.
    """

    data: Any = SELF
    num_calibration_samples: int = 128
    max_seq_length: int = 512
    seed: int = 0
    device: str = "cpu"
    encode: Encode | None = field(default=None, repr=False)
    write: Graph | None = field(default=None, repr=False)
    start: int | None = field(default=None, repr=False)
    checkpoint: Checkpoint | None = field(default=None, repr=False)
    coverage: dict[str, Coverage] = field(default_factory=dict, repr=False)
    drawn: list[Tensor | Inputs] = field(default_factory=list, repr=False)
    memory: WeakKeyDictionary[Node, dict[Statistic, Any]] = field(
        default_factory=WeakKeyDictionary, repr=False
    )
    felt: dict[tuple[Node, int], Gradients] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.num_calibration_samples < 1 or self.max_seq_length < 2:
            raise InputError(
                "calibration needs at least 1 sample of at least 2 tokens, not "
                f"{self.num_calibration_samples} of {self.max_seq_length}"
            )

    @property
    def place(self) -> torch.device:
        """The device; InputError where torch does not have it."""
        return parse_device(self.device)

    def bound(
        self, graph: Graph, encode: Encode | None, start: int | None, context: int | None = None
    ) -> Calibration:
        """Return this calibration for a model: its canonical graph, its tokenizer, the token that
        its texts start with, the longest text that it takes."""
        longest = min(self.max_seq_length, context or self.max_seq_length)
        return replace(
            self, encode=encode, write=graph, start=start, max_seq_length=longest, drawn=[],
            coverage={}, memory=WeakKeyDictionary(), felt={},
        )  # fmt: skip

    def samples(self) -> list[Tensor | Inputs]:
        """Return the data, read or written when it is first needed: sequences of tokens, or records
        of inputs."""
        if not self.drawn:
            count, length = self.num_calibration_samples, self.max_seq_length
            if isinstance(self.data, str) and self.data == SELF:
                if self.write is None:
                    raise QcError("the model writes its own text only where there is a model")
                self.drawn.extend(
                    write_sequences(self.write, self.start, count, length, self.seed, self.place)
                )
            else:
                self.drawn.extend(read_data(self.data, self.encode, count, length))
        return self.drawn

    def sequences(self) -> list[Tensor]:
        """Return the data where it is sequences of tokens; InputError where it is not."""
        found = [each for each in self.samples() if isinstance(each, Tensor)]
        if len(found) < len(self.samples()):
            raise InputError(
                "this needs sequences of tokens to predict the next of, not inputs by name"
            )
        return found

    def tokens(self) -> int:
        """Count the tokens of all sequences; of inputs by name, the rows."""
        return sum(
            len(each if isinstance(each, Tensor) else next(iter(each.values())))
            for each in self.samples()
        )

    def tensors(self) -> list[Tensor]:
        """Return all that the data holds, in one order."""
        return [
            tensor
            for each in self.samples()
            for tensor in ([each] if isinstance(each, Tensor) else [each[k] for k in sorted(each)])
        ]

    def batches(self, graph: Graph) -> list[Batch]:
        """Return the inputs of a graph for all data; caches are empty."""
        named = [each for each in self.samples() if not isinstance(each, Tensor)]
        if named:
            return [named_inputs(graph, each) for each in named]
        return [inputs_of(graph, ids) for ids in batched(self.sequences())]

    # ------------------------------------------------------------ analyses

    def measure(self, graph: Graph, requests: Mapping[Node, Sequence[Statistic]]) -> Known:
        """Return statistics of nodes of a graph, each measured once: result[node, statistic]."""
        missing = {
            node: tuple(each for each in wanted if each not in self.remembered(node))
            for node, wanted in requests.items()
        }
        missing = {node: wanted for node, wanted in missing.items() if wanted}
        if missing:
            walk = Walk(graph, self.batches(graph), self.place)
            ordered = sorted(missing, key=graph.positions.__getitem__)
            for step in plan_steps([node] for node in ordered):
                found = walk.advance(step, missing)
                for (node, statistic), result in found.items():
                    self.remembered(node)[statistic] = result
        return {
            (node, each): self.remembered(node)[each]
            for node, wanted in requests.items()
            for each in wanted
        }

    def measured(self, graph: Graph, node: Node, statistic: Statistic) -> Any:
        """Return one statistic of one node."""
        return self.measure(graph, {node: (statistic,)})[node, statistic]

    def remembered(self, node: Node) -> dict[Statistic, Any]:
        """Return what is known of a node."""
        return self.memory.setdefault(node, {})

    def gradients(
        self, graph: Graph, parameters: Sequence[Node], samples: int = 32
    ) -> dict[Node, Gradients]:
        """Return the mean square (the diagonal of the Fisher information) and the mean magnitude
        of the gradients of the loss by each weight, over the first `samples` sequences."""
        missing = [p for p in parameters if (p, samples) not in self.felt]
        for node, found in squared_gradients(self, graph, missing, samples).items():
            self.felt[node, samples] = found
        return {p: self.felt[p, samples] for p in parameters}

    # ------------------------------------------------------------ sequential methods

    def visit(
        self,
        graph: Graph,
        linears: Iterable[Node],
        statistics: Sequence[Statistic],
        visit: Visit,
        sequencing: Sequencing = "sequential",
        report: Report = lambda text, fraction: None,
    ) -> dict[Node, Weight]:
        """Let `visit` store the weights of linears group by group, in the order of the graph.

        A group is the linears that read one value; `visit` gets it with the statistics of that
        value. Where `sequencing` is "sequential" these include the errors of all weights that are
        stored already; "independent" measures the graph as it is. `Drift` compares the two, at the
        price of evaluating both. Finished groups are written to
        the checkpoint, if there is one, and read from it in place of calling `visit`.
        """
        groups = linear_groups(graph, linears)
        walk = Walk(graph, self.batches(graph), self.place)
        compares = any(isinstance(each, Drift) for each in statistics)
        original = (
            Walk(graph, walk.batches, self.place)
            if compares and sequencing == "sequential"
            else None
        )

        def advance(step: Step, wanted: Mapping[Node, Sequence[Statistic]]) -> Known:
            if original is None:
                return walk.advance(step, wanted)
            return advance_both(walk, original, step, wanted)

        stored: dict[Node, Weight] = {}
        waiting: list[
            Step
        ] = []  # of finished groups: computed only where an unfinished one follows
        for number, (group, step) in enumerate(
            zip(groups, plan_steps([g.x] for g in groups), strict=True)
        ):
            kept = self.checkpoint
            found = kept.read(group.parameters, self.coverage) if kept else None
            if found is None:
                for earlier in waiting:
                    advance(earlier, {})
                waiting.clear()
                found = dict(visit(group, advance(step, {group.x: statistics})))
                for weight in found.values():
                    self.coverage.setdefault(weight.name, Coverage(self.tokens()))
                if kept:
                    kept.write(group.parameters, found, self.coverage)
            else:
                waiting.append(step)
            for parameter, weight in found.items():
                if sequencing == "sequential":
                    walk.store(parameter, weight)
            stored |= found
            names = ", ".join(weight.name for weight in found.values())
            report(f"calibrate {names}", (number + 1) / len(groups))
        return stored


def named_inputs(graph: Graph, given: Inputs) -> dict[str, Tensor]:
    """Return the inputs of a graph from values by name; InputError for one that is missing."""
    values: dict[str, Tensor] = {}
    for node in graph.inputs:
        assert isinstance(node.op, ops.Input)
        type, label = node.op.type, node.op.label
        if label not in given:
            names = ", ".join(given)
            raise InputError(
                f"input {label} ({type}) is missing in a calibration record of {names}"
            )
        values[label] = given[label].to(type.dtype)
    try:
        bind_symbols(graph.inputs, values)
    except ValueError as error:
        raise InputError(f"a calibration record does not fit the model: {error}") from None
    return values


def inputs_of(graph: Graph, ids: Tensor) -> dict[str, Tensor]:
    """Return the inputs of a graph for a batch of token ids: the first table of integers is the
    ids, masks see everything, other integers are 0, caches are empty."""
    values: dict[str, Tensor] = {}
    seen_ids = False
    for node in graph.inputs:
        assert isinstance(node.op, ops.Input)
        type, label = node.op.type, node.op.label
        if type.rank == 4 and not isinstance(type.shape[1], int):  # keys or values of the past
            values[label] = torch.zeros(len(ids), 0, *type.shape[2:], dtype=type.dtype)
        elif type.rank != 2:
            raise InputError(
                f"input {label} is {type}: calibration on tokens knows ids, masks and caches; "
                "give records of tensors by the names of the inputs"
            )
        elif "mask" in label:
            values[label] = torch.ones(ids.shape, dtype=type.dtype)
        elif not seen_ids and not type.is_float:
            values[label], seen_ids = ids.to(type.dtype), True
        else:
            values[label] = torch.zeros(ids.shape, dtype=type.dtype)
    return values
