"""Lower a planned graph to a program: values, steps, the distinct kernels, the arrays to store.

A value of the graph becomes one or more buffers ("values" for a tensor; "codes" and "scale" for a
quantized one). A reshape is another view of the same buffers; a cache append writes into the buffer
of its past. Layers with equal bodies and formats share a kernel. What a kernel is, and which steps
call it, each backend says in its own `Lowering`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

import sympy
import torch
from torch import Tensor

from qc.backends.artifact import dim_text
from qc.backends.region import RESULT, ArrayArgument, Region, Repack, region_of
from qc.errors import UnsupportedError
from qc.ir import ops
from qc.ir.fused import Fused, fuse
from qc.ir.graph import Graph, map_nodes
from qc.ir.node import Node, make
from qc.ir.target import Target
from qc.ir.types import (
    DTYPE_NAMES,
    Dim,
    TensorType,
    as_dim,
    dim_symbols,
    symbol,
)
from qc.ir.weights.weight import ArraySpec, Weight
from qc.runtime.expression import parse_expression
from qc.runtime.manifest import KernelStep, Scalar, Step, Value, ValueArg

Place = dict[str, int]
"""The buffers of one value of the graph: array name -> index into the program's values."""


class Compiled(Protocol):
    """What every backend's rules return: how weights are laid out, and whose buffer is written."""

    @property
    def repack(self) -> Mapping[tuple[int, str], Repack]: ...

    @property
    def in_place(self) -> int | None: ...


Found = TypeVar("Found", bound=Compiled)
"""What the rules of a backend make of a region."""
Code = TypeVar("Code")
"""What a backend compiles: the kernels of a program."""


@dataclass
class Lowered(Generic[Code]):
    """A program before its code is compiled. `arrays` computes what is stored, by tensor name."""

    target: Target
    values: list[Value] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    kernels: dict[str, Code] = field(default_factory=dict)
    arrays: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    on_torch: list[tuple[str, str]] = field(default_factory=list)
    """(ATen overload, origin) of what stayed on torch."""

    @property
    def symbols(self) -> tuple[str, ...]:
        """Every symbol that a shape or a scalar argument uses."""
        texts = {str(d) for value in self.values for d in value.shape}
        for step in self.steps:
            texts |= set(step.when)
            if isinstance(step, KernelStep):
                texts |= {str(d) for d in step.grid}
                texts |= {str(a.symbol) for a in step.args if isinstance(a, Scalar)}
                for argument in step.args:
                    if isinstance(argument, ValueArg):
                        texts |= {str(d) for d in argument.shape or ()}
            else:
                texts |= template_symbols(step.args)
        names = {name for text in texts for name in parse_expression(text).symbols}
        return tuple(sorted(names))


class Lowering(ABC, Generic[Found, Code]):
    """One lowering: where each value lives, and which kernels exist already."""

    def __init__(
        self, graph: Graph, target: Target, rules: Sequence[Callable[[Region], Found | None]]
    ) -> None:
        self.graph = graph
        self.rules = rules
        self.program: Lowered[Code] = Lowered(target)
        self.places: dict[Node, Place] = {}
        self.found: dict[object, Found | None] = {}
        self.specs: dict[object, ArraySpec] = {}
        self.states = cache_inputs(graph)

    def run(self) -> Lowered[Code]:
        """Turn the graph into a program."""
        for node in self.graph.nodes:
            self.place(node)
        self.name_outputs()
        return self.program

    @abstractmethod
    def add_steps(self, node: Node, key: object, found: Found) -> None:
        """Add the steps that compute a fused node, and the kernels that they call."""

    @abstractmethod
    def call_torch(self, node: Node) -> None:
        """Add an ATen call that stays on torch, or refuse it."""

    @abstractmethod
    def quantized(self, name: str, type: TensorType, kind: str = "scratch") -> Place:
        """Add the buffers of a quantized value."""

    # ---- values

    def place(self, node: Node) -> None:
        """Decide where a node's value lives, and add the step that computes it."""
        match node.op:
            case ops.Scalar() | ops.Parameter():
                pass  # scalars are part of bodies; parameters are placed by the kernels' layouts
            case ops.Input(label):
                self.places[node] = self.place_input(node, label)
            case ops.Reshape() | ops.Item():
                self.places[node] = self.view(node)
            case ops.Torch():
                self.call_torch(node)
            case Fused():
                self.call_fused(node)
            case _:
                raise UnsupportedError(
                    f"{node.op} is not planned", origin=node.origin.module or None
                )

    def place_input(self, node: Node, label: str) -> Place:
        """Add an input of the call, or a state that the session keeps."""
        type = node.tensor
        if node in self.states:
            shape = (type.shape[0], sympy.Symbol("context"), *type.shape[2:])
            if type.format is not None:
                return self.quantized(label, replace(type, shape=shape), "state")
            return {"values": self.add_value(label, type.dtype, shape, "state")}
        index = self.add_value(label, type.dtype, type.shape, "input")
        self.program.values[index] = replace(
            self.program.values[index], below=table_rows(self.graph, node)
        )
        self.program.inputs.append(label)
        return {"values": index}

    def add_value(
        self,
        name: str,
        dtype: torch.dtype,
        shape: Sequence[Dim],
        kind: str,
        tensor: str | None = None,
    ) -> int:
        """Append a value to the program."""
        dims = tuple(d if isinstance(d, int) else str(d) for d in shape)
        value = Value(name, DTYPE_NAMES[dtype], dims, kind, tensor)  # type: ignore[arg-type]
        self.program.values.append(value)
        return len(self.program.values) - 1

    def scratch(self, type: TensorType) -> Place:
        """Add the buffers of a computed value."""
        number = len(self.program.values)
        if "past" in dim_symbols(type.shape):
            raise UnsupportedError(
                f"a value of shape {type} grows with the cached past; only caches may"
            )
        if type.format is None:
            return {"values": self.add_value(f"v{number}", type.dtype, type.shape, "scratch")}
        return self.quantized(f"v{number}", type)

    def view(self, node: Node) -> Place:
        """Return the buffers behind a reshape or an item of a call with several results."""
        source = node.inputs[0]
        if isinstance(node.op, ops.Item):
            return {"values": self.places[source][str(node.op.index)]}
        if isinstance(source.op, ops.Parameter):
            return {"values": self.stored(source, "values", source.op.weight.dense)}
        return self.places[source]

    # ---- kernels

    def call_fused(self, node: Node) -> None:
        """Add the steps of a fused node; where no rule takes the whole, its parts one by one."""
        region = self.region(node)
        key = region_key(region)
        if key not in self.found:
            self.found[key] = next((k for rule in self.rules if (k := rule(region))), None)
        found = self.found[key]
        if found is None:
            self.places[node] = self.place_parts(node)
            return
        if found.in_place is None:
            self.places[node] = self.scratch(self.result_type(node, found))
        else:
            self.places[node] = self.places[node.inputs[found.in_place]]
        self.add_steps(node, key, found)

    def region(self, node: Node) -> Region:
        """Return what the rules look at: trailing rows are rows like any others."""
        region = region_of(node, self.program.target)
        return with_symbol(region, KEEP, SEQ) if counts_trailing_rows(region) else region

    def result_type(self, node: Node, found: Found) -> TensorType:
        """Return the type under which the result of a kernel is stored."""
        return node.tensor

    def place_parts(self, node: Node) -> Place:
        """Lower the body of a fused node one node a kernel."""
        assert isinstance(node.op, Fused)
        body = node.op.body
        image: dict[Node, Node] = dict(zip(body.inputs, node.inputs, strict=True))
        inner = [n for n in body.nodes if n.inputs or n not in body.inputs]
        for part in inner:
            if isinstance(part.op, ops.Scalar):
                image[part] = part
                continue
            outer = Node(part.op, tuple(image[i] for i in part.inputs), part.type, node.origin)
            if len(inner) == 1:
                raise UnsupportedError(
                    f"no kernel computes {part.op}", origin=node.origin.module or None
                )
            if not isinstance(part.op, ops.Reshape):
                outer = fuse(part.op.name, outer, frozenset({outer}))
            self.place(outer)
            image[part] = outer
        return self.places[image[body.outputs[0]]]

    def names(self, node: Node) -> dict[sympy.Symbol, sympy.Symbol]:
        """Return how the symbols of a shared kernel are called where `node` is computed."""
        return {SEQ: KEEP} if counts_trailing_rows(region_of(node, self.program.target)) else {}

    def array_argument(
        self, node: Node, rule: str, found: Found, argument: ArrayArgument
    ) -> ValueArg:
        """Bind an array argument to a buffer of this node or of an operand."""
        shape = argument.shape
        if shape is None:
            shape = self.default_shape(node, argument)
        names = self.names(node)
        texts = None if shape is None else tuple(dim_text(renamed(d, names)) for d in shape)
        return ValueArg(self.buffer(node, rule, found, argument), texts)

    def default_shape(self, node: Node, argument: ArrayArgument) -> tuple[Dim, ...] | None:
        """Return the shape in which an operand is seen: its own, as a reshape shares buffers."""
        operand = node if argument.operand == RESULT else node.inputs[argument.operand]
        if argument.array != "values" or isinstance(operand.op, ops.Parameter):
            return None
        shape = operand.tensor.shape
        return None if "past" in dim_symbols(shape) else shape

    def buffer(self, node: Node, rule: str, found: Found, argument: ArrayArgument) -> int:
        """Return the value that an array argument stands for."""
        if argument.operand == RESULT:
            return self.places[node][argument.array]
        operand = node.inputs[argument.operand]
        if not isinstance(operand.op, ops.Parameter):
            return self.places[operand][argument.array]
        weight = operand.op.weight
        repack = found.repack.get((argument.operand, argument.array))
        layout = "" if repack is None else f"{rule}:"
        name = f"{layout}{argument.array}"
        if repack is None:
            return self.stored(operand, name, lambda: weight.arrays()[argument.array])
        alike = (str(weight.format), weight.shape, name)
        if alike not in self.specs:
            planned = planned_spec(repack, weight)
            if planned is not None:
                self.specs[alike] = planned
        return self.stored(operand, name, lambda: repack(weight), alike)

    def stored(
        self,
        parameter: Node,
        array: str,
        compute: Callable[[], Tensor],
        alike: object = None,
    ) -> int:
        """Add a stored array of a parameter, once.

        It is computed when it is written. Only its shape and dtype are needed now: what is known of
        arrays that are `alike`, or else those of this one.
        """
        place = self.places.setdefault(parameter, {})
        if array not in place:
            assert isinstance(parameter.op, ops.Parameter)
            tensor = self.unused_name(f"{parameter.op.weight.name}.{array}".replace(":", "."))
            spec = self.specs.get(alike) if alike is not None else None
            if spec is None:
                example = compute()
                spec = self.specs[alike] = ArraySpec(tuple(example.shape), example.dtype)
                compute = given_once(example)
            self.program.arrays[tensor] = compute
            place[array] = self.add_value(tensor, spec.dtype, spec.shape, "weight", tensor)
        return place[array]

    def unused_name(self, name: str) -> str:
        """Return `name`, numbered where two parameters share it."""
        taken, number = self.program.arrays, 1
        while name in taken:
            number += 1
            name = f"{name.removesuffix(f'#{number - 1}')}#{number}"
        return name

    # ---- outputs

    def name_outputs(self) -> None:
        """Mark the buffers that the call returns."""
        for name, node in zip(self.graph.output_names, self.graph.outputs, strict=True):
            if name in present_names(self.graph, self.states):
                continue
            index = self.computed(node)
            value = self.program.values[index]
            shape = tuple(dim_text(d) for d in node.tensor.shape)
            self.program.values[index] = replace(value, name=name, kind="output", shape=shape)
            self.program.outputs.append(name)

    def computed(self, node: Node) -> int:
        """Return the buffer of an output; a copy where it is an input, stored, or taken."""
        index = self.places.get(node, {}).get("values")
        if index is not None and self.program.values[index].kind == "scratch":
            return index
        copy = make(ops.Cast(node.tensor.dtype), node)
        copied = fuse("copy", copy, frozenset({copy}))
        self.place(copied)
        return self.places[copied]["values"]


def single_nodes(node: Node) -> list[Node]:
    """Return the parts of a fused node, each fused alone, as they are lowered where no rule takes
    the whole; operands outside stay what they are."""
    assert isinstance(node.op, Fused)
    body = node.op.body
    image: dict[Node, Node] = dict(zip(body.inputs, node.inputs, strict=True))
    parts = []
    for part in body.nodes:
        if isinstance(part.op, ops.Input):
            continue
        outer = Node(part.op, tuple(image[i] for i in part.inputs), part.type, node.origin)
        image[part] = outer
        if not isinstance(part.op, ops.Scalar | ops.Reshape):
            parts.append(fuse(part.op.name, outer, frozenset({outer})))
    return parts


def planned_spec(repack: Callable[[Weight], Tensor], weight: Weight) -> ArraySpec | None:
    """Return what `repack` makes of a weight of this format, without values; None where it reads
    values."""
    planned = weight.format.planned(weight.name, weight.shape, weight.dtype)
    try:
        with torch.device("meta"):  # where the tables that repacking makes lie, too
            array = repack(planned)
    except (RuntimeError, NotImplementedError):  # what torch raises where values are read
        return None
    return ArraySpec(tuple(array.shape), array.dtype) if array.is_meta else None


def given_once(array: Tensor) -> Callable[[], Tensor]:
    """Return a function that gives `array` away, so that it is freed once it is written."""
    held = [array]
    return held.pop


SEQ, KEEP = symbol("seq"), symbol("keep")
SHAPELESS = (
    ops.Input, ops.Scalar, ops.Linear, ops.Unary, ops.Binary, ops.Where, ops.Cast,
    ops.GatedActivation, ops.RMSNorm, ops.LayerNorm, ops.Hadamard, ops.Quantize, ops.FakeQuantize,
)  # fmt: skip
"""Ops without a shape among their attributes: a body of these fits any number of rows."""


def counts_trailing_rows(region: Region) -> bool:
    """Say whether a body works on the trailing positions, by ops that do not care which."""
    names = {name for node in region.body.nodes for name in dim_symbols(node.tensor.shape)}
    return (
        "keep" in names
        and "seq" not in names
        and all(isinstance(node.op, SHAPELESS) for node in region.body.nodes)
    )


def with_symbol(region: Region, old: sympy.Symbol, new: sympy.Symbol) -> Region:
    """Rename a dimension, so that trailing positions share the kernels of all positions."""

    def rename(node: Node, inputs: tuple[Node, ...]) -> Node:
        shape = tuple(renamed(d, {old: new}) for d in node.tensor.shape)
        type = node.tensor.reshaped(shape)
        op = replace(node.op, type=type) if isinstance(node.op, ops.Input) else node.op
        return Node(op, inputs, type, node.origin)

    operands = tuple(rename(o, o.inputs) if o.op.name != "weight" else o for o in region.operands)
    return Region(map_nodes(region.body, rename), operands, region.target)


def renamed(dim: Dim, names: Mapping[sympy.Symbol, sympy.Symbol]) -> Dim:
    """Substitute symbols in a dimension."""
    return dim if isinstance(dim, int) else as_dim(dim.subs(names))


def region_key(region: Region) -> object:
    """Return what must be equal for two regions to share a kernel."""
    operands = tuple(
        (
            str(node.type),
            str(node.op.weight.format) if isinstance(node.op, ops.Parameter) else "",
            is_append(node),
        )
        for node in region.operands
    )
    root = region.root
    return (structure_key(region), operands, str(root.type), str(region.target))


def structure_key(region: Region) -> str:
    """Describe a body by its ops and operand numbers."""
    number = {node: i for i, node in enumerate(region.body.nodes)}
    lines = []
    for node in region.body.nodes:
        kind = "input" if isinstance(node.op, ops.Input) else repr(node.op)
        lines.append(f"{kind}:{node.type}({','.join(str(number[i]) for i in node.inputs)})")
    inputs = ",".join(str(number[i]) for i in region.body.inputs)
    return ";".join([*lines, inputs, str(number[region.root])])


def is_append(node: Node) -> bool:
    """Say whether a value is a cache that has just been appended to."""
    op = node.op.body.outputs[0].op if isinstance(node.op, Fused) else node.op
    return isinstance(op, ops.Append)


def cache_inputs(graph: Graph) -> frozenset[Node]:
    """Return the inputs that are pasts of caches: read by nothing but an append that is an
    output."""
    found = set()
    for node in graph.inputs:
        users = graph.users[node]
        if len(users) == 1 and is_append(users[0]) and users[0] in graph.outputs:
            found.add(node)
    return frozenset(found)


def present_names(graph: Graph, states: frozenset[Node]) -> set[str]:
    """Return the names of outputs that are caches kept by the session."""
    return {
        name
        for name, node in zip(graph.output_names, graph.outputs, strict=True)
        if is_append(node) and any(i in states for i in node.inputs)
    }


def table_rows(graph: Graph, ids: Node) -> int | None:
    """Return the bound below which ids must stay: the rows of the smallest table they index."""
    rows: list[int] = []
    for user in graph.users[ids]:
        body = user.op.body if isinstance(user.op, Fused) else None
        if body is None:
            continue
        inside = body.inputs[user.inputs.index(ids)]
        for node in body.nodes:
            if isinstance(node.op, ops.Embedding) and node.inputs[0] is inside:
                size = node.inputs[1].tensor.shape[0]
                rows += [size] if isinstance(size, int) else []
    return min(rows, default=None)


def template_symbols(template: object) -> set[str]:
    """Return the symbolic expressions in a torch template."""
    if isinstance(template, dict):
        return {str(template["symbol"])} if "symbol" in template else set()
    if isinstance(template, list | tuple):
        return set().union(*(template_symbols(t) for t in template))
    return set()
