"""Any body of element-by-element and index operations: each program writes some elements of the
result, each traced back to the elements that it is made of.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qc.backends.region import ArrayArgument, Region, Repack
from qc.backends.triton.expression import Rendering, arrays_read
from qc.backends.triton.glue import Glue
from qc.backends.triton.kernel import Call, Cells, KernelRule, Variant
from qc.backends.triton.rendering import ELEMENTWISE, render
from qc.backends.triton.storage import declare_input, declare_result, is_cache
from qc.ir import ops
from qc.ir.axes import matching_axes
from qc.ir.node import Node
from qc.ir.types import Dim, as_dim, element_count
from qc.ir.weights.affine import simplify
from qc.ir.weights.expression import COL, ROW, Expr, is_structural
from qc.ir.weights.weight import WeightFormat

INDEXING = (
    ops.Reshape, ops.Permute, ops.Expand, ops.Slice, ops.Concat, ops.Arange, ops.Full,
    ops.Scalar, ops.Size, ops.Embedding,
)  # fmt: skip

BLOCK = 512
"""Elements of a program: two for each of its threads and half as many again to keep in flight."""

Index = tuple[str, ...]
"""The names of positions, one an axis."""


@dataclass
class Elements:
    """Traces elements of a body back to its inputs. `inside` names the condition under which they
    exist; what is outside is not read."""

    glue: Glue
    region: Region
    pointers: dict[Node, str]
    known: dict[object, str] = field(default_factory=dict)

    def value(self, node: Node, index: Index, inside: str) -> str:
        """Return the name of the value of `node` at `index`."""
        key = (node, index, inside)
        if key not in self.known:
            self.known[key] = self.computed(node, index, inside)
        return self.known[key]

    def computed(self, node: Node, index: Index, inside: str) -> str:
        """Write the computation of an element."""
        glue, dtype = self.glue, node.tensor.dtype
        if isinstance(node.op, ELEMENTWISE):
            operands = [
                self.value(i, broadcast(index, i.tensor.shape), inside) for i in node.inputs
            ]
            return render(glue, node, operands)
        match node.op:
            case ops.Input():
                return self.load(node, index, inside)
            case ops.Scalar(value) | ops.Full(_, value):
                computed_in = torch.float32 if dtype.is_floating_point else dtype
                return glue.number(value, computed_in)
            case ops.Size(dim):
                return glue.size(dim)
            case ops.Arange(_, start):
                moved = glue.call("elements.shifted", index[0], glue.size(start))
                return glue.call("elements.indices", moved)
            case ops.Reshape():
                return self.value(node.inputs[0], self.reshaped(node, index), inside)
            case ops.Permute(order):
                source = tuple(index[order.index(axis)] for axis in range(len(order)))
                return self.value(node.inputs[0], source, inside)
            case ops.Expand():
                source = broadcast(index, node.inputs[0].tensor.shape)
                return self.value(node.inputs[0], source, inside)
            case ops.Slice(axis, start, _, step):
                at = index[axis]
                if step != 1:
                    at = glue.call("elements.scaled", at, step)
                if start != 0:
                    at = glue.call("elements.shifted", at, glue.size(start))
                return self.value(
                    node.inputs[0], (*index[:axis], at, *index[axis + 1 :]), inside
                )  # fmt: skip
            case ops.Concat(axis):
                return self.joined(node, axis, index, inside)
            case ops.Embedding():
                ids, table = node.inputs
                rows = glue.size(table.tensor.shape[0])
                row = glue.call(
                    "elements.row_of_table", self.value(ids, index[:-1], inside), rows
                )  # fmt: skip
                if table not in self.pointers:
                    return self.decoded(table, row, index[-1])
                return self.value(table, (row, index[-1]), inside)
        raise TypeError(f"{node.op} is no index operation")

    def load(self, node: Node, index: Index, inside: str) -> str:
        """Read an input; its axes are laid out row-major."""
        pointer = self.pointers[node]
        if not node.tensor.shape:
            return self.glue.call("elements.load_one", pointer)
        offset = self.flatten(index, node.tensor.shape)
        return self.glue.call("elements.load", pointer, offset, inside)

    def decoded(self, table: Node, row: str, column: str) -> str:
        """Read an element of a table as it is stored. Every row and column that comes is one."""
        operand, shape = self.region.body.inputs.index(table), shape_of(table)
        format = self.region.format_of(table)
        assert format is not None
        expr, arrays = decode_of(format, shape), format.arrays(shape)
        names = {
            array: self.glue.pointer(ArrayArgument(operand, array), arrays[array].dtype)
            for array in arrays_read(expr)
        }
        return self.glue.decode(Rendering(arrays, names, (ROW, COL)), expr, row, column)

    def flatten(self, index: Index, dims: tuple[Dim, ...]) -> str:
        """Combine positions along several axes into one."""
        whole = self.known.get(("split", index, tuple(map(str, dims))))
        if whole is not None:
            return whole
        terms = [
            (at, element_count(dims[axis + 1 :]))
            for axis, at in enumerate(index)
            if dims[axis] != 1
        ]
        if not terms:
            return "0"
        (at, stride), *rest = terms
        total = at if stride == 1 else self.glue.call("elements.scaled", at, self.glue.size(stride))
        for at, stride in rest:
            total = self.glue.call("elements.step", total, at, self.glue.size(stride))
        return total

    def split(self, position: str, dims: tuple[Dim, ...]) -> Index:
        """Split one position into positions along several axes."""
        first = next((axis for axis, dim in enumerate(dims) if dim != 1), None)
        index = []
        for axis, dim in enumerate(dims):
            stride = element_count(dims[axis + 1 :])
            if dim == 1:
                index.append("0")
            elif axis == first and stride == 1:
                index.append(position)
            elif axis == first:
                index.append(self.glue.call("elements.leading", position, self.glue.size(stride)))
            else:
                sizes = self.glue.size(stride), self.glue.size(dim)
                index.append(self.glue.call("elements.coordinate", position, *sizes))
        self.known["split", tuple(index), tuple(map(str, dims))] = position
        return tuple(index)

    def reshaped(self, node: Node, index: Index) -> Index:
        """Return the index in the operand of a reshape."""
        old, new = node.inputs[0].tensor.shape, node.tensor.shape
        result: list[str] = []
        for inner, outer in matching_axes(old, new):
            whole = self.flatten(tuple(index[a] for a in outer), tuple(new[a] for a in outer))
            result += self.split(whole, tuple(old[a] for a in inner))
        return tuple(result)

    def joined(self, node: Node, axis: int, index: Index, inside: str) -> str:
        """Choose the operand of a concatenation by position; only the chosen one is read."""
        glue, start = self.glue, as_dim(0)
        result = ""
        for number, part in enumerate(node.inputs):
            stop = as_dim(start + part.tensor.shape[axis])
            here = glue.call("elements.between", index[axis], glue.size(start), glue.size(stop))
            exists = glue.call("elements.both", here, inside)
            at = index[axis] if number == 0 else glue.call(
                "elements.before", index[axis], glue.size(start))  # fmt: skip
            value = self.value(part, (*index[:axis], at, *index[axis + 1 :]), exists)
            result = value if number == 0 else glue.call("elementwise.where", here, value, result)
            start = stop
        return result


def broadcast(index: Index, shape: tuple[Dim, ...]) -> Index:
    """Return the index in an operand of `shape` that is broadcast."""
    if not shape:
        return ()
    return tuple(
        "0" if dim == 1 else at for dim, at in zip(shape, index[-len(shape) :], strict=True)
    )


def is_stored_table(region: Region, node: Node) -> bool:
    """Say whether an input is a table that is only looked up in, and stored as codes that can be
    read one by one."""
    format = region.format_of(node)
    users = region.body.users[node]
    looked_up = all(isinstance(u.op, ops.Embedding) and u.inputs[0] is not node for u in users)
    if format is None or not looked_up or list(format.arrays(shape_of(node))) == ["0.values"]:
        return False
    return not is_structural(decode_of(format, shape_of(node)))


def decode_of(format: WeightFormat, shape: tuple[int, int]) -> Expr:
    """Return the value of element (ROW, COL) of a stored matrix."""
    return simplify(format.decode(shape, ROW, COL), {ROW: shape[0], COL: shape[1]})


def shape_of(node: Node) -> tuple[int, int]:
    """Return the shape of a stored matrix."""
    rows, columns = node.tensor.shape
    return int(rows), int(columns)


def elements(region: Region) -> Call | None:
    """A body of element-by-element and index operations."""
    inner = [n for n in region.body.nodes if not isinstance(n.op, ops.Input)]
    if not inner or not all(isinstance(n.op, (*ELEMENTWISE, *INDEXING)) for n in inner):
        return None
    if any(is_cache(operand) for operand in region.operands):
        return None
    if any(operand.tensor.format for operand in region.operands):
        return None
    glue, repack = Glue("elements"), dict[tuple[int, str], Repack]()
    pointers = {
        node: declare_input(glue, region, node, repack)
        for node in region.body.inputs
        if not is_stored_table(region, node)
    }
    result = declare_result(glue, region)
    shape = region.root.tensor.shape
    count = element_count(shape)
    position = glue.call("elements.positions", BLOCK)
    inside = glue.call("elements.below", position, glue.size(count))
    traced = Elements(glue, region, pointers)
    value = traced.value(region.root, traced.split(position, shape), inside)
    glue.do("elements.store", result, position, inside, value)
    launch = glue.launch((Cells(count, BLOCK),))
    return Call(count, (Variant(None, (launch,)),), repack)


element_rules: tuple[KernelRule, ...] = (elements,)
