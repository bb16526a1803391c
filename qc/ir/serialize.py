"""A graph as plain JSON beside named arrays, and back.

    content, arrays = graph_to_json(graph)
    graph_from_json(content, arrays).same_as(graph)

Nodes stand in topological order and read earlier ones by number. A file may be hostile: every
class, field, size and number is checked, types are inferred anew, nothing is evaluated, and an
uninterpreted call must be a pure ATen operator that torch knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qc.errors import ArtifactError, UnsupportedError
from qc.ir import ops
from qc.ir.fused import Fused
from qc.ir.graph import Graph
from qc.ir.node import Node, Origin
from qc.ir.op import Op
from qc.ir.plain import build_record, read_class, read_record, read_value, write_record, write_value
from qc.ir.types import TensorType, TupleType, ValueType
from qc.ir.weights.catalog import term_formats
from qc.ir.weights.weight import Term, Weight

VERSION = 1
"""Raised by every change that an older reader would misread."""

CALLABLE_NAMESPACE = "aten"
REFUSED_CALLS = ("from_file",)  # reads files

MOST_RANK = 8
MOST_BODIES = 4

WRONG_OPERANDS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What type rules raise, told of operands that they were not written for."""


@cache
def op_classes() -> dict[str, type[Op]]:
    """Return all ops by class name."""
    found = {
        name: value
        for name, value in vars(ops).items()
        if isinstance(value, type) and issubclass(value, Op) and value is not Op
    }
    return {**found, Fused.__name__: Fused}


# ---------------------------------------------------------------- writing


def graph_to_json(graph: Graph) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a graph as plain JSON, and the arrays that it names.

    UnsupportedError for what could not be read back, such as a call outside ATen.
    """
    writer = Writer()
    return {"version": VERSION, **writer.graph(graph)}, writer.arrays


class Writer:
    """One run of `graph_to_json`: the arrays so far."""

    def __init__(self) -> None:
        self.arrays: dict[str, Tensor] = {}
        self.stored: dict[Weight, dict[str, Any]] = {}

    def graph(self, graph: Graph) -> dict[str, Any]:
        """Write nodes, inputs and outputs."""
        number = graph.positions
        return {
            "inputs": [number[node] for node in graph.inputs],
            "outputs": {
                name: number[node]
                for name, node in zip(graph.output_names, graph.outputs, strict=True)
            },
            "nodes": [self.node(node, [number[i] for i in node.inputs]) for node in graph.nodes],
        }

    def node(self, node: Node, inputs: list[int]) -> dict[str, Any]:
        """Write one node; its type is not written, for it follows."""
        try:
            written: dict[str, Any] = {"op": self.op(node.op)}
        except UnsupportedError as error:
            raise UnsupportedError(error.message, origin=node.origin.module or None) from None
        if inputs:
            written["inputs"] = inputs
        if node.origin != Origin():
            written["origin"] = [node.origin.module, *node.origin.passes]
        return written

    def op(self, op: Op) -> dict[str, Any]:
        """Write an op by its class and its fields."""
        if isinstance(op, ops.Parameter):
            return {"is": "Parameter", "weight": self.weight(op.weight)}
        if isinstance(op, Fused):
            return {"is": "Fused", "label": op.label, "body": self.graph(op.body)}
        if isinstance(op, ops.Torch) and not op.overload.startswith(f"{CALLABLE_NAMESPACE}."):
            raise UnsupportedError(
                f"a call of {op.overload} cannot be saved: it is no part of ATen"
            )
        return write_record(op)

    def weight(self, weight: Weight) -> dict[str, Any]:
        """Write what describes a weight; its arrays are put beside, once."""
        if weight not in self.stored:
            self.stored[weight] = {
                "name": weight.name,
                "shape": list(weight.shape),
                "dtype": write_value(weight.dtype),
                "terms": [self.term(weight.name, i, term) for i, term in enumerate(weight.terms)],
            }
        return self.stored[weight]

    def term(self, weight: str, index: int, term: Term) -> dict[str, Any]:
        """Write a term: its format, and under which names its arrays stand."""
        names = {}
        for array, tensor in term.arrays().items():
            names[array] = self.unused_name(f"{weight}.{index}.{array}")
            self.arrays[names[array]] = tensor
        return {"format": write_record(term.format), "arrays": names}

    def unused_name(self, name: str) -> str:
        """Return `name`, numbered where two weights share it."""
        numbered, number = name, 1
        while numbered in self.arrays:
            number += 1
            numbered = f"{name}#{number}"
        return numbered


# ---------------------------------------------------------------- reading


def graph_from_json(content: Any, arrays: Mapping[str, Tensor]) -> Graph:
    """Read a graph; ArtifactError says in one sentence what is wrong with it."""
    table = take(content, {"version", "inputs", "outputs", "nodes"}, "the graph")
    if table["version"] != VERSION or type(table["version"]) is not int:
        raise ArtifactError(
            f"the graph has version {str(table['version'])[:20]}; this qc reads version {VERSION}: "
            "update qc, or compile the model again"
        )
    return Reader(arrays).graph({k: v for k, v in table.items() if k != "version"}, "the graph")


def take(content: Any, required: set[str], where: str, optional: set[str] | None = None) -> Any:
    """Return an object with exactly these names."""
    if not isinstance(content, dict):
        raise ArtifactError(f"{where} is {str(content)[:80]}, not an object")
    for name in required - content.keys():
        raise ArtifactError(f"{where} has no {name!r}")
    for name in content.keys() - required - (optional or set()):
        raise ArtifactError(f"{where} has the unknown field {name[:60]!r}")
    return content


class Reader:
    """One run of `graph_from_json`."""

    def __init__(self, arrays: Mapping[str, Tensor]) -> None:
        self.arrays = arrays

    def graph(self, content: Any, where: str, depth: int = 0) -> Graph:
        """Read nodes in order, then what goes in and out."""
        if depth > MOST_BODIES:
            raise ArtifactError(f"{where} is nested too deeply")
        table = take(content, {"inputs", "outputs", "nodes"}, where)
        nodes: list[Node] = []
        for number, each in enumerate(as_list(table["nodes"], f"the nodes of {where}")):
            nodes.append(self.node(each, nodes, f"node {number} of {where}", depth))
        inputs = numbered(table["inputs"], nodes, f"the inputs of {where}")
        outputs = table["outputs"]
        if not isinstance(outputs, dict) or not outputs:
            raise ArtifactError(f"{where} has no outputs")
        roots = numbered(list(outputs.values()), nodes, f"the outputs of {where}")
        check_inputs(inputs, nodes, where)
        return Graph(inputs, roots, tuple(outputs))

    def node(self, content: Any, earlier: list[Node], where: str, depth: int) -> Node:
        """Read one node and infer its type."""
        table = take(content, {"op"}, where, {"inputs", "origin"})
        op = self.op(table["op"], where, depth)
        inputs = numbered(table.get("inputs", []), earlier, where)
        origin = read_origin(table.get("origin", [""]), where)
        if isinstance(op, ops.Torch):
            check_call(op, len(inputs), where)
        try:
            type = op.infer(*(i.type for i in inputs))
        except WRONG_OPERANDS as error:
            raise ArtifactError(
                f"{where} ({op.name}) does not fit what it reads: {error}",
                origin=origin.module or None,
            ) from None
        return Node(op, inputs, checked_type(type, where), origin)

    def op(self, content: Any, where: str, depth: int) -> Op:
        """Read an op."""
        cls = read_class(content, op_classes(), where)
        if cls not in (ops.Parameter, Fused):
            op: Op = read_record(content, op_classes(), where)
            return op
        values = {name: each for name, each in content.items() if name != "is"}
        if "weight" in values:
            values["weight"] = self.weight(values["weight"], f"the weight of {where}")
        if "body" in values:
            values["body"] = self.graph(values["body"], f"the body of {where}", depth + 1)
        built: Op = build_record(cls, values, where)
        return built

    def weight(self, content: Any, where: str) -> Weight:
        """Read a weight and its arrays."""
        table = take(content, {"name", "shape", "dtype", "terms"}, where)
        name, shape = table["name"], as_list(table["shape"], f"the shape of {where}")
        if not isinstance(name, str):
            raise ArtifactError(f"{where} has no name")
        where = f"weight {name[:100]!r}"
        if len(shape) > MOST_RANK or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
            raise ArtifactError(f"{where} has the shape {str(shape)[:80]}")
        dtype = read_value(table["dtype"], where)
        if not isinstance(dtype, torch.dtype):
            raise ArtifactError(f"{where} has the dtype {str(dtype)[:80]}")
        terms = as_list(table["terms"], f"the terms of {where}")
        if not terms:
            raise ArtifactError(f"{where} has no terms")
        read = tuple(self.term(each, tuple(shape), where) for each in terms)
        return Weight(name, tuple(shape), read, dtype)

    def term(self, content: Any, shape: tuple[int, ...], where: str) -> Term:
        """Read one term; its format checks its arrays."""
        table = take(content, {"format", "arrays"}, f"a term of {where}")
        format = read_record(table["format"], term_formats(), f"the format of {where}")
        names = table["arrays"]
        if not isinstance(names, dict):
            raise ArtifactError(f"a term of {where} names no arrays")
        for stored in names.values():
            if not isinstance(stored, str) or stored not in self.arrays:
                raise ArtifactError(
                    f"{where} needs the array {str(stored)[:100]!r}, which is not there"
                )
        try:
            expected = format.arrays(shape).keys()
            if names.keys() != expected:
                raise ArtifactError(f"{where}: {format} stores {', '.join(expected)}")
            term: Term = format.term(shape, {n: self.arrays[s] for n, s in names.items()})
            return term
        except WRONG_OPERANDS as error:
            raise ArtifactError(f"{where}: {error}") from None


def as_list(content: Any, where: str) -> list[Any]:
    """Return a list."""
    if not isinstance(content, list):
        raise ArtifactError(f"{where} is {str(content)[:80]}, not a list")
    return content


def numbered(content: Any, nodes: list[Node], where: str) -> tuple[Node, ...]:
    """Return the nodes of these numbers; they stand before what reads them."""
    found = []
    for number in as_list(content, f"what {where} reads"):
        if type(number) is not int or not 0 <= number < len(nodes):
            raise ArtifactError(
                f"{where} names node {str(number)[:20]}, which does not stand before it"
            )
        found.append(nodes[number])
    return tuple(found)


def check_inputs(inputs: tuple[Node, ...], nodes: list[Node], where: str) -> None:
    """Require that the inputs are exactly the Input nodes, with a label each."""
    labels = [node.op.label for node in inputs if isinstance(node.op, ops.Input)]
    if len(labels) != len(inputs) or len(set(labels)) != len(labels):
        raise ArtifactError(f"the inputs of {where} are not one Input node each")
    for node in nodes:
        if isinstance(node.op, ops.Input) and node not in inputs:
            raise ArtifactError(
                f"{where} reads {node.op.label[:60]!r}, which is none of its inputs"
            )


def read_origin(content: Any, where: str) -> Origin:
    """Read the path in the model, then the passes."""
    if not isinstance(content, list) or not content or not all(isinstance(p, str) for p in content):
        raise ArtifactError(f"{where} has the origin {str(content)[:80]}")
    return Origin(content[0], tuple(content[1:]))


def checked_type(type: Any, where: str) -> ValueType:
    """Require that a type rule, fed from a file, gave a type."""
    if not isinstance(type, TensorType | TupleType):
        raise ArtifactError(f"{where} has no type")
    return type


def check_call(op: ops.Torch, operands: int, where: str) -> None:
    """Allow a call of a pure ATen operator with arguments that its schema takes."""
    namespace, _, rest = op.overload.partition(".")
    packet = rest.partition(".")[0]
    if namespace != CALLABLE_NAMESPACE or packet in REFUSED_CALLS:
        raise ArtifactError(f"{where}: a graph may not call {op.overload[:80]!r}")
    try:
        schema = op.operator._schema
    except (AttributeError, RuntimeError, ValueError):
        raise ArtifactError(
            f"{where}: torch {torch.__version__} has no operator {op.overload[:80]!r}"
        ) from None
    if schema.is_mutable:
        raise ArtifactError(f"{where}: {op.overload} changes its arguments in place")
    positional = [argument for argument in schema.arguments if not argument.kwarg_only]
    known = {argument.name for argument in schema.arguments}
    named = {pair[0] for pair in op.kwargs}
    if len(op.args) > len(positional) or not named <= known:
        raise ArtifactError(f"{where}: {op.overload} does not take these arguments")
    if any(not 0 <= index < operands for index in operands_of((op.args, op.kwargs))):
        raise ArtifactError(f"{where}: {op.overload} has {operands} operands and uses others")


def operands_of(template: Any) -> list[int]:
    """List the operands that an argument template uses."""
    if isinstance(template, ops.Operand):
        return [template.index]
    if isinstance(template, tuple | list):
        return [index for each in template for index in operands_of(each)]
    return []
