"""Render decode expressions as Triton device functions: one statement for each shared node.

A rendered function takes the indices that the expression reads, as tensors that broadcast against
each other, and pointers to the arrays; it returns float32. It is the format's own expression and
nothing else, so that any format runs on a GPU without code of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qc.ir.weights.expression import (
    Arith,
    AsFloat,
    AsHalf,
    Code,
    Const,
    Expr,
    Index,
    Load,
    Sum,
    ToFloat,
    walk,
)
from qc.ir.weights.weight import ArraySpec

INFIX = {
    "add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%",
    "and": "&", "or": "|", "shr": ">>", "shl": "<<",
}  # fmt: skip
CALLS = {"min": "tl.minimum", "eq": "decode.equal", "lt": "decode.less"}
WIDE = 1 << 31


@dataclass
class Block:
    """Statements of one depth; a sum opens a deeper one."""

    depth: int
    lines: list[str] = field(default_factory=list)


@dataclass
class Rendering:
    """Render one expression. `specs` are the arrays, `names` the pointers they come by."""

    specs: Mapping[str, ArraySpec]
    names: Mapping[str, str]
    indices: Sequence[Index]
    raw: bool = False
    """Leave loads as they are stored."""

    def __post_init__(self) -> None:
        self.seen: dict[Expr, str] = {}
        self.blocks = [Block(1)]
        self.bound: dict[Index, int] = {}
        self.count = 0

    def function(self, name: str, expr: Expr) -> str:
        """Return the text of a device function that computes `expr`."""
        result = self.name_of(expr)
        parameters = [*(str(i) for i in self.indices), *self.names.values()]
        body = [*self.blocks[0].lines, f"    return {result}"]
        return "\n".join(["@triton.jit", f"def {name}({', '.join(parameters)}):", *body])

    def name_of(self, expr: Expr) -> str:
        """Return the variable, or the number, that holds `expr`."""
        if isinstance(expr, Const):
            return f"({expr.value!r})" if expr.value < 0 else repr(expr.value)
        if isinstance(expr, Index):
            return str(expr)
        if isinstance(expr, ToFloat) and isinstance(expr.value, Const):
            return repr(float(expr.value.value))
        if expr not in self.seen:
            text = self.sum(expr) if isinstance(expr, Sum) else self.text(expr)
            self.seen[expr] = self.bind(expr, text)
        return self.seen[expr]

    def bind(self, expr: Expr, text: str) -> str:
        """Write `text` in the outermost block that knows all its indices."""
        depth = max((self.bound[i] for i in free(expr) if i in self.bound), default=0)
        return self.assign(self.blocks[depth], text)

    def assign(self, block: Block, text: str) -> str:
        """Add an assignment to a new variable."""
        name = f"v{self.count}"
        self.count += 1
        block.lines.append("    " * block.depth + f"{name} = {text}")
        return name

    def text(self, expr: Expr) -> str:
        """Return one node over the variables of its operands."""
        match expr:
            case Load(array, index):
                if self.raw:
                    return f"tl.load({self.names[array]} + {self.flat(array, index)})"
                kind = "float" if self.specs[array].dtype.is_floating_point else "int"
                return f"decode.load_{kind}({self.names[array]} + {self.flat(array, index)})"
            case Code(array, index, position, width):
                last = self.specs[array].shape[-1] - 1
                row = self.flat(array, (*index, Const(0)))
                at, size = self.name_of(position), bytes_of(expr)
                return f"decode.code({self.names[array]} + {row}, {at}, {width}, {size}, {last})"
            case ToFloat(inner):
                return f"decode.to_float({self.name_of(inner)})"
            case AsFloat(inner):
                return f"decode.as_float({self.name_of(inner)})"
            case AsHalf(inner):
                return f"decode.as_half({self.name_of(inner)})"
            case Arith(kind, left, right) if kind in INFIX:
                return f"{self.name_of(left)} {INFIX[kind]} {self.name_of(right)}"
            case Arith(kind, left, right):
                return f"{CALLS[kind]}({self.name_of(left)}, {self.name_of(right)})"
        raise TypeError(f"{expr!r} is no expression of the decode language")

    def flat(self, array: str, index: Sequence[Expr]) -> str:
        """Return where an element lies, row-major."""
        shape = self.specs[array].shape
        wide = self.specs[array].bytes >= WIDE
        parts = []
        for axis, place in enumerate(index):
            stride = 1
            for size in shape[axis + 1 :]:
                stride *= size
            if isinstance(place, Const) and place.value == 0:
                continue
            name = self.name_of(place)
            name = f"decode.wide({name})" if wide and not isinstance(place, Const) else name
            parts.append(name if stride == 1 else f"{name} * {stride}")
        return " + ".join(parts) or "0"

    def sum(self, expr: Sum) -> str:
        """Write a loop; where ranges differ from element to element, over the widest one."""
        depth = max((self.bound[i] for i in free(expr) if i in self.bound), default=0)
        outer = self.blocks[depth]
        start, stop = self.name_of(expr.start), self.name_of(expr.stop)
        known = isinstance(expr.start, Const) and isinstance(expr.stop, Const)
        shape = ", ".join(str(i) for i in self.indices)
        total = self.assign(outer, f"decode.zeros({shape})")
        first = start if known else f"decode.lowest({start})"
        last = stop if known else f"decode.highest({stop})"
        saved, self.blocks = self.blocks, [*self.blocks[: depth + 1], Block(outer.depth + 1)]
        self.bound[expr.index] = depth + 1
        value = self.name_of(expr.body)
        if not known:
            value = f"decode.within({start}, {expr.index}, {stop}, {value})"
        inner = self.blocks[depth + 1]
        inner.lines.append("    " * inner.depth + f"{total} += {value}")
        self.blocks = saved
        del self.bound[expr.index]
        head = f"for {expr.index} in range({first}, {last}):"  # after what the body left outside
        outer.lines += ["    " * outer.depth + head, *inner.lines]
        inside = [each for each in self.seen if expr.index in free(each)]
        for each in inside:  # variables of the loop's body end with it
            del self.seen[each]
        return total


def free(expr: Expr) -> set[Index]:
    """Return the indices that an expression reads, but for those that its sums count."""
    if isinstance(expr, Index):
        return {expr}
    found = set().union(*map(free, expr.operands))
    return found - {expr.index} if isinstance(expr, Sum) else found


def bytes_of(code: Code) -> int:
    """Return over how many bytes the bits of a code may lie."""
    match code.position:
        case Arith("mul", _, Const(step)) if step == code.width and 8 % code.width == 0:
            return 1
    return (code.width + 14) // 8


def arrays_read(*expressions: Expr) -> list[str]:
    """List the arrays that expressions read, in order of first use."""
    found = (each for expr in expressions for each in reversed(walk(expr)))
    return list(dict.fromkeys(each.array for each in found if isinstance(each, Load | Code)))
