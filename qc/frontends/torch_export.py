"""nn.Module -> Graph by torch.export, every ATen call carried untouched as `ops.Torch`."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import sympy
import torch
import torch.fx.config
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, TensorArgument
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.utils import _pytree as pytree

from qc.errors import ModelError, UnsupportedError
from qc.frontends.repeated import Repeats, body_of, is_mark, is_repeat, repeating
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, Origin, make
from qc.ir.types import DTYPE_NAMES, TensorType, TupleType, ValueType, as_dim, symbol
from qc.ir.types import Dim as Dimension
from qc.ir.weights.dense import dense_in_file, dense_term
from qc.ir.weights.mapped import MappedTensor, memory_of
from qc.ir.weights.weight import Weight

Stored = Tensor | MappedTensor
"""What a parameter is stored as: values in memory, or a place in a file."""

EXAMPLE_BATCH, EXAMPLE_SEQ = 2, 12
"""Sizes of example inputs; torch.export takes sizes 0 and 1 for constants."""


def capture(
    model: nn.Module,
    example: Sequence[Any] | Mapping[str, Any] | None = None,
    stored: Mapping[str, Stored] | None = None,
) -> Graph:
    """Capture the forward pass of `model` in evaluation mode and float32.

    `example` holds positional or named inputs; a transformers model needs none. `stored` gives
    tensors to store instead of the model's own, by parameter name: the model's may be
    uninitialised. Weights share memory with their tensors; float16 and bfloat16 stay stored so.
    """
    args, kwargs = example_arguments(model, example)
    with evaluation_mode(model), float32_parameters(model) as originals:
        program, repeats = export(model, args, kwargs)
        tensors = {**program.constants, **program.state_dict, **originals, **(stored or {})}
        graph = Translation(program, tensors, repeats).graph()
    if example is None:
        require_variable_sizes(graph, model)
    return graph


def require_variable_sizes(graph: Graph, model: nn.Module) -> None:
    """Refuse a transformers model that computes for one size of batch or sequence only."""
    for node in graph.inputs:
        axes = node.tensor.shape[: 1 if node.tensor.is_float else 2]
        if any(isinstance(size, int) for size in axes):
            raise UnsupportedError(
                f"{type(model).__name__} works for one size of its input only: {node.type}"
            )


# ---------------------------------------------------------------- the example inputs


def example_arguments(
    model: nn.Module, example: Sequence[Any] | Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and named example inputs, with at least two rows in every batch."""
    if isinstance(example, Mapping):
        return (), {**without_cache(model), **{k: two_rows(v) for k, v in example.items()}}
    if isinstance(example, Tensor):
        example = (example,)
    if example is not None:
        return tuple(two_rows(value) for value in example), without_cache(model)
    return (), {**without_cache(model), **make_example(model)}


def two_rows(value: Any) -> Any:
    """Repeat a batch of one, which torch.export would take for a constant."""
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == 1:
        return torch.cat([value, value])
    return value


def make_example(model: nn.Module) -> dict[str, Tensor]:
    """Make the main input of a transformers model from its configuration."""
    config, label = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or label is None:
        raise ModelError(f"{type(model).__name__} is no transformers model: give example inputs")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{type(model).__name__} is an encoder-decoder; only decoders, encoders and vision "
            "models are captured without example inputs"
        )
    if label == "input_ids":
        text = config.get_text_config()
        seq = min(EXAMPLE_SEQ, getattr(text, "max_position_embeddings", EXAMPLE_SEQ))
        ids = torch.arange(EXAMPLE_BATCH * seq) % min(text.vocab_size, 100)
        return {label: ids.reshape(EXAMPLE_BATCH, seq)}
    if label == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {label: torch.zeros(EXAMPLE_BATCH, vision.num_channels, height, width)}
    raise ModelError(f"{type(model).__name__} takes {label}: give example inputs")


def without_cache(model: nn.Module) -> dict[str, Any]:
    """Return the argument that switches a model's own key-value cache off, if it takes one."""
    takes = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in takes else {}


def batch_of(values: Iterable[Any]) -> int | None:
    """Return the size of the batch in example inputs: the first axis of the first of several."""
    return next((v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim > 1), None)


def dynamic_axes(value: Any, batch: int | None = None) -> Any:
    """Say which axes of an example vary: the first, and the second of token ids. A vector varies
    where it has an element for each row of the batch, as time steps and classes have."""
    if not isinstance(value, Tensor):
        several = isinstance(value, list | tuple)
        return [dynamic_axes(v, batch) for v in value] if several else None
    if value.ndim < 2:
        return {0: Dim.AUTO} if value.ndim and len(value) == batch else {}
    if value.ndim == 2 and not value.is_floating_point():
        return {0: Dim.AUTO, 1: Dim.AUTO}
    return {0: Dim.AUTO}


# ---------------------------------------------------------------- the export


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and back for each module that was training."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def float32_parameters(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Give half-precision parameters untouched float32 memory for a while; yield the originals.

    The memory is virtual: export reads no values, and nothing is converted.
    """
    halves = {
        name: tensor
        for name, tensor in named_tensors(model).items()
        if tensor.dtype in (torch.float16, torch.bfloat16)
    }
    originals = {name: tensor.data for name, tensor in halves.items()}
    try:
        for tensor in {id(t): t for t in halves.values()}.values():
            tensor.data = torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
        yield originals
    finally:
        for name, tensor in halves.items():
            tensor.data = originals[name]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by every name they have."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ExportedProgram, Repeats]:
    """Export with dynamic batch and sequence, without in-place operations; equal layers are traced
    once where that is possible."""
    with repeating(model) as repeats:
        if repeats.groups:
            try:
                program = trace(model, args, kwargs)
            except ModelError:
                pass  # a layer needs its number, or the model is wrong: the whole trace says which
            else:
                if not mutates(program):
                    return program, repeats
    program = trace(model, args, kwargs)
    return (program.run_decompositions({}) if mutates(program) else program), Repeats()


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """Run torch.export; ModelError where it fails."""
    shapes = {**named_arguments(model, args), **kwargs}
    batch = batch_of(shapes.values())
    dynamic = {name: dynamic_axes(value, batch) for name, value in shapes.items()}
    try:
        with torch.no_grad(), lean_tracing():
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # torch.export raises whatever the model's code raises
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise ModelError(f"torch.export cannot capture {type(model).__name__}: {first}") from error


@contextmanager
def lean_tracing() -> Iterator[None]:
    """Leave out what only debuggers read, a quarter of the time: the stack trace of every call,
    and Python code for every graph in between."""
    before = getattr(fx.config, "do_not_emit_stack_traces", False)
    fx.config.do_not_emit_stack_traces = True
    try:
        with _use_lazy_graph_module(True):
            yield
    finally:
        fx.config.do_not_emit_stack_traces = before


def named_arguments(model: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Name positional arguments as `forward` does."""
    bound = inspect.signature(model.forward).bind_partial(*args)
    return dict(bound.arguments)


def mutates(program: ExportedProgram) -> bool:
    """Say whether a program has in-place operations (x.add_(y))."""
    called = (
        node.target
        for module in program.graph_module.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
    )
    return any(
        isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable for target in called
    )


# ---------------------------------------------------------------- FX -> IR


@dataclass(eq=False)
class Translation:
    """The translation of one exported program; `env` holds the value of each FX node, which is
    an IR node, a dimension, or a tuple of these. `layer` is the (group, layer) that repeats the
    first of its group at the moment."""

    program: ExportedProgram
    tensors: Mapping[str, Stored]
    repeats: Repeats = field(default_factory=Repeats)
    layer: tuple[int, int] | None = None
    symbols: dict[sympy.Symbol, sympy.Symbol] = field(default_factory=dict)
    parameters: dict[tuple[object, ...], Node] = field(default_factory=dict)
    inputs: list[Node] = field(default_factory=list)

    def graph(self) -> Graph:
        """Translate everything; the first output of the model is the graph's."""
        module = self.program.graph_module
        env: dict[fx.Node, Any] = {}
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        for node in placeholders:
            self.name_symbols(node, specs[node.name])
        for node in placeholders:
            env[node] = self.leaf(node, specs[node.name])
        results = self.run(module, env)
        name, result = self.first_output(results)
        return Graph(tuple(self.inputs), (result,), (name,))

    def name_symbols(self, node: fx.Node, spec: InputSpec) -> None:
        """Call the symbols of an input's axes batch and seq."""
        value = node.meta.get("val")
        if spec.kind is not InputKind.USER_INPUT or not isinstance(value, Tensor):
            return
        for axis, size in enumerate(value.shape):
            expr = size.node.expr if isinstance(size, torch.SymInt) else None
            if not isinstance(expr, sympy.Symbol) or expr in self.symbols:
                continue
            name = ("batch", "seq")[axis] if axis < 2 else f"{node.name}_{axis}"
            if symbol(name) in self.symbols.values():
                name = f"{node.name}_{axis}"
            self.symbols[expr] = symbol(name)

    def leaf(self, node: fx.Node, spec: InputSpec) -> Any:
        """Translate a placeholder: an input, or a stored tensor."""
        if spec.kind is InputKind.USER_INPUT:
            if not isinstance(spec.arg, TensorArgument):
                return getattr(spec.arg, "value", None)
            type = self.tensor_type(node.meta["val"])
            self.inputs.append(make(ops.Input(node.name, type), origin=Origin()))
            return self.inputs[-1]
        if spec.target is None or spec.target not in self.tensors:
            raise UnsupportedError(f"the model holds {node.name}, which is no tensor")
        return self.parameter(spec.target, node.meta["val"].dtype)

    def parameter(self, name: str, dtype: torch.dtype) -> Node:
        """Store a tensor under its name; tied tensors are one node."""
        tensor = self.tensors[name]
        key = (*memory_of(tensor), dtype)
        if key not in self.parameters:
            term = dense_in_file(tensor) if isinstance(tensor, MappedTensor) else dense_term(
                tensor.detach())  # fmt: skip
            weight = Weight(name, tuple(tensor.shape), (term,), dtype)
            self.parameters[key] = make(ops.Parameter(weight), origin=Origin())
        return self.parameters[key]

    def run(self, module: fx.GraphModule, env: dict[fx.Node, Any]) -> Any:
        """Translate the calls of a module; return what it returns."""
        for node in module.graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], lambda n: env[n])
            if node.op == "get_attr":
                env[node] = self.attribute(module, str(node.target))
            if node.op == "call_function":
                env[node] = self.call(node, env)
        raise ModelError("the exported program returns nothing")

    def attribute(self, module: fx.GraphModule, path: str) -> Any:
        """Return a submodule, or the node of a tensor that the program holds."""
        value = operator.attrgetter(path)(module)
        if not isinstance(value, Tensor):
            return value
        weight = Weight(path, tuple(value.shape), (dense_term(value.detach()),), value.dtype)
        return make(ops.Parameter(weight), origin=Origin())

    def call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """Translate one call."""
        if is_mark(node):
            return tuple(env[value] for value in cast(list[fx.Node], node.args[1]))
        if is_repeat(node):
            return self.repeat(node, env)
        target, origin = node.target, Origin(self.name(module_path(node)))
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self.inline(node, env, origin)
        if target is operator.getitem:
            held, index = cast(tuple[Any, int], fx.map_arg(node.args, lambda n: env[n]))
            return (
                make(ops.Item(index), held, origin=origin)
                if isinstance(held, Node)
                else held[index]
            )
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
            return self.dimension(value, origin)
        if value is None or isinstance(value, bool | torch.SymBool):
            return value  # assertions: nothing reads them
        if not isinstance(target, torch._ops.OpOverload):
            raise UnsupportedError(
                f"a call of {target} cannot be captured", origin=origin.module or None
            )
        operands: list[Node] = []
        args = tuple(self.template(a, env, operands) for a in node.args)
        kwargs = {k: self.template(a, env, operands) for k, a in node.kwargs.items()}
        op = ops.Torch(str(target), args, portable(kwargs), self.value_type(value, origin))
        return make(op, *operands, origin=origin)

    def name(self, name: str) -> str:
        """Return the name of a module or tensor in the layer that repeats another one."""
        return name if self.layer is None else self.repeats.name_in(*self.layer, name)

    def repeat(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """Translate the calls of the first layer of a group again, for another one."""
        group, layer, values = cast(tuple[int, int, list[fx.Node]], node.args)
        module = self.program.graph_module
        enter, body, leave = body_of(module, group)
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        self.layer = (group, layer)
        inner = {**env, enter: tuple(env[value] for value in values)}
        for held in module.graph.nodes:
            spec = specs.get(held.name) if held.op == "placeholder" else None
            target = spec.target if spec is not None else None
            if target is not None and self.name(target) != target:
                inner[held] = self.parameter(self.name(target), held.meta["val"].dtype)
        for each in body:
            if each.op == "get_attr":
                inner[each] = self.attribute(module, str(each.target))
            if each.op == "call_function":
                inner[each] = self.call(each, inner)
        self.layer = None
        return tuple(inner[value] for value in cast(list[fx.Node], leave.args[1]))

    def inline(self, node: fx.Node, env: dict[fx.Node, Any], origin: Origin) -> Any:
        """Translate the body of a block that only switches gradients or autocast."""
        name = str(node.target)
        skipped = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}.get(name)
        if skipped is None or (name == "wrap_with_autocast" and node.args[2]):
            raise UnsupportedError(
                f"a block of {name} cannot be captured", origin=origin.module or None
            )
        held: Any = fx.map_arg(node.args[skipped:], lambda n: env[n])
        body, *arguments = held
        placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
        return self.run(body, dict(zip(placeholders, arguments, strict=True)))

    def template(self, argument: Any, env: dict[fx.Node, Any], operands: list[Node]) -> Any:
        """Turn an argument into a template; tensors become operands."""
        if isinstance(argument, fx.Node):
            return self.template(env[argument], env, operands)
        if isinstance(argument, Node):
            if argument not in operands:
                operands.append(argument)
            return ops.Operand(operands.index(argument))
        if isinstance(argument, list | tuple):
            return tuple(self.template(a, env, operands) for a in argument)
        return argument

    def first_output(self, results: Any) -> tuple[str, Node]:
        """Find the model's first output and its name."""
        specs = self.program.graph_signature.output_specs
        values = [
            value
            for value, spec in zip(results, specs, strict=True)
            if spec.kind is OutputKind.USER_OUTPUT
        ]
        structured = pytree.tree_unflatten(values, self.program.call_spec.out_spec)
        if isinstance(structured, Mapping):
            named = {name: v for name, v in structured.items() if isinstance(v, Node)}
            name = "logits" if "logits" in named else next(iter(named), "")
            if name:
                return name, named[name]
        found = [v for v in values if isinstance(v, Node)]
        if not found:
            raise ModelError("the model returns no tensor")
        return "output", found[0]

    def value_type(self, value: Any, origin: Origin) -> ValueType:
        """Read the type of a call's result off its example value."""
        if isinstance(value, Tensor):
            return self.tensor_type(value, origin)
        if isinstance(value, list | tuple) and all(isinstance(v, Tensor) for v in value):
            return TupleType(tuple(self.tensor_type(v, origin) for v in value))
        raise UnsupportedError(f"a call that returns {type(value).__name__} cannot be captured")

    def tensor_type(self, value: Tensor, origin: Origin | None = None) -> TensorType:
        """Read shape and dtype, with the symbols' new names."""
        if value.dtype not in DTYPE_NAMES:
            where = origin.module or None if origin else None
            raise UnsupportedError(f"values of {value.dtype} cannot be captured", origin=where)
        return TensorType(tuple(self.dimension(d) for d in value.shape), value.dtype)

    def dimension(self, value: torch.SymInt | int, origin: Origin | None = None) -> Dimension:
        """Translate a size; UnsupportedError where it depends on the values of a tensor."""
        dim = as_dim(value)
        if isinstance(dim, int):
            return dim
        unknown = dim.free_symbols - self.symbols.keys()
        if unknown:
            raise UnsupportedError(
                f"the size {dim} depends on values, not on the shapes of the inputs",
                origin=origin.module or None if origin else None,
            )
        return as_dim(dim.xreplace(self.symbols))


def portable(kwargs: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Drop where results were allocated: graphs are evaluated on the CPU."""
    return tuple((k, v) for k, v in kwargs.items() if k not in ("device", "pin_memory"))


def module_path(node: fx.Node) -> str:
    """Return the path of the innermost module that a call was made in."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1].split("@")[0] if paths else ""
