"""Trace one of many equal layers, and let the others repeat what it did.

Most of the time of torch.export goes into layers that differ in nothing but the values of their
parameters. Of every group of such layers in a ModuleList the first is traced; the others become one
call each, `qc::repeat`, which the translation replaces by what the first one did, with their own
parameters.

Two layers are equal when their classes, submodules, parameter shapes and attributes are. An
attribute that counts the layers (`layer_idx`) may differ: while the first one is traced it is an
object that nothing can be computed from, so that a layer whose work depends on its number is never
repeated. A layer that is called otherwise than the first (other shapes, other options) is traced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

LEAST = 3
"""Layers of a group that are worth it."""

HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_pre_hooks")
SIMPLE = (bool, int, float, str, torch.dtype, torch.device, type(None))
INTERNAL = frozenset({"_parameters", "_buffers", "_modules", "training", "forward"})

LIBRARY = torch.library.Library("qc", "DEF")
LIBRARY.define("enter(int group, Tensor[] values) -> Tensor[]")
LIBRARY.define("leave(int group, Tensor[] values) -> Tensor[]")
LIBRARY.define("repeat(int group, int layer, Tensor[] values) -> Tensor[]")


class Number:
    """Stand in for the number of a layer: whoever computes with it fails."""

    def refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("the number of a layer decides what it does")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __floordiv__ = refuse
    __truediv__ = __rtruediv__ = __pow__ = __neg__ = __eq__ = __ne__ = __lt__ = __le__ = refuse
    __gt__ = __ge__ = __bool__ = __int__ = __float__ = __index__ = __hash__ = refuse
    __str__ = __repr__ = __format__ = __iter__ = __len__ = __getitem__ = refuse


@dataclass(eq=False)
class Group:
    """Equal layers of one ModuleList: the first is traced. `call` is how it was called, and
    `results` what it returned; `counting` are the attributes that hold a layer's number."""

    paths: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    counting: frozenset[tuple[str, str]]
    call: tuple[object, ...] | None = None
    results: tuple[list[Any], Any] | None = None


@dataclass(eq=False)
class Repeats:
    """The groups of a model whose layers are being repeated."""

    groups: list[Group] = field(default_factory=list)

    def name_in(self, group: int, layer: int, name: str) -> str:
        """Return the name that a tensor or module of the first layer has in another one."""
        paths = self.groups[group].paths
        first = paths[0]
        if name == first or name.startswith(f"{first}."):
            return paths[layer] + name[len(first) :]
        return name


# ---------------------------------------------------------------- which layers are equal


def find_groups(model: nn.Module) -> list[Group]:
    """List the groups of at least `LEAST` equal layers."""
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < LEAST:
            continue
        counting = counting_attributes(module)
        alike: dict[object, list[int]] = {}
        for number, layer in enumerate(module):
            alike.setdefault(signature(layer, counting), []).append(number)
        for numbers in alike.values():
            if len(numbers) >= LEAST:
                paths = tuple(f"{path}.{number}" for number in numbers)
                found.append(Group(paths, tuple(module[n] for n in numbers), counting))
    return outermost(found)


def outermost(groups: list[Group]) -> list[Group]:
    """Leave out groups inside the layers of another one."""

    def is_inside(group: Group) -> bool:
        return any(
            path != group.paths[0] and group.paths[0].startswith(f"{path}.")
            for other in groups
            for path in other.paths
        )

    return [group for group in groups if not is_inside(group)]


def counting_attributes(layers: nn.ModuleList) -> frozenset[tuple[str, str]]:
    """Return (submodule, name) of the attributes that hold the number of their layer."""
    found = None
    for number, layer in enumerate(layers):
        own = {
            (path, name)
            for path, module in layer.named_modules()
            for name, value in vars(module).items()
            if type(value) is int and value == number
        }
        found = own if found is None else found & own
    return frozenset(found or ())


def signature(layer: nn.Module, counting: frozenset[tuple[str, str]]) -> object:
    """Describe everything that a layer is but the values of its tensors and its number."""
    parts: list[object] = []
    for path, module in layer.named_modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        shapes = tuple((name, tuple(t.shape), t.dtype) for name, t in tensors)
        plain = tuple(
            (name, described(value))
            for name, value in sorted(vars(module).items())
            if name not in INTERNAL
            and (path, name) not in counting
            and (value or not is_hook(name))
        )
        parts.append((path, type(module), shapes, plain))
    names = [name for name, _ in layer.named_parameters(remove_duplicate=False)]
    return (tuple(parts), tuple(names))


def is_hook(name: str) -> bool:
    """Say whether an attribute holds hooks: a layer that has some is like no other."""
    return name.endswith(HOOKS)


def described(value: object) -> object:
    """Return what is equal for equal values; objects are equal to themselves only."""
    if isinstance(value, SIMPLE):
        return (type(value), value)
    if isinstance(value, tuple | list):
        return (type(value), tuple(map(described, value)))
    if isinstance(value, set | frozenset) and all(isinstance(v, SIMPLE) for v in value):
        return frozenset(value)
    if isinstance(value, partial):
        return (value.func, described(value.args), described(sorted(value.keywords.items())))
    return id(value)


# ---------------------------------------------------------------- while the model is traced


@contextmanager
def repeating(model: nn.Module) -> Iterator[Repeats]:
    """Let equal layers of a model repeat the first of them while it is traced."""
    repeats = Repeats(find_groups(model))
    changed: list[tuple[nn.Module, str, object]] = []
    try:
        for number, group in enumerate(repeats.groups):
            for path, name in group.counting:
                module = group.layers[0].get_submodule(path)
                changed.append((module, name, vars(module)[name]))
                vars(module)[name] = Number()
            for position, layer in enumerate(group.layers):
                changed.append((layer, "forward", vars(layer).get("forward")))
                vars(layer)["forward"] = partial(call, group, number, position, layer.forward)
        with implemented(repeats):
            yield repeats
    finally:
        for module, name, value in reversed(changed):
            if name == "forward" and value is None:
                del vars(module)[name]
            else:
                vars(module)[name] = value


def call(group: Group, number: int, position: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Do what a layer does when it is called: the first is traced, between two marks."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    how = (structure, *map(described_leaf, leaves), *shared(tensors))
    if position and group.call == how and group.results is not None:
        results, form = group.results
        made = iter(torch.ops.qc.repeat(number, position, tensors))
        return pytree.tree_unflatten(
            [next(made) if isinstance(leaf, Tensor) else leaf for leaf in results], form
        )
    if position or group.call is not None:
        return forward(*args, **kwargs)
    group.call = how
    entered = iter(torch.ops.qc.enter(number, tensors))
    inner = [next(entered) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(inner, structure)
    results, form = pytree.tree_flatten(forward(*args, **kwargs))
    if not all(isinstance(leaf, Tensor | type(None)) for leaf in results):
        return pytree.tree_unflatten(results, form)
    group.results = (results, form)
    left = iter(torch.ops.qc.leave(number, [r for r in results if r is not None]))
    return pytree.tree_unflatten(
        [next(left) if isinstance(leaf, Tensor) else leaf for leaf in results], form
    )


def described_leaf(leaf: object) -> object:
    """Describe an argument: of a tensor what is known without its values. An object that is no
    plain value may be changed by a layer, so it is like no other."""
    if isinstance(leaf, Tensor):
        return (str(tuple(leaf.shape)), str(leaf.stride()), leaf.dtype)
    return (type(leaf), leaf) if isinstance(leaf, SIMPLE) else object()


def shared(tensors: Sequence[Tensor]) -> list[int]:
    """Say which of several tensors are the same."""
    first: dict[int, int] = {}
    return [first.setdefault(id(tensor), n) for n, tensor in enumerate(tensors)]


@contextmanager
def implemented(repeats: Repeats) -> Iterator[None]:
    """Give the three operators shapes, for as long as a model is traced."""

    def alike(values: Sequence[Tensor]) -> list[Tensor]:
        return [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype) for v in values]

    def marked(group: int, values: Sequence[Tensor]) -> list[Tensor]:
        return alike(values)

    def repeated(group: int, layer: int, values: Sequence[Tensor]) -> list[Tensor]:
        results = repeats.groups[group].results
        assert results is not None
        return alike([leaf for leaf in results[0] if isinstance(leaf, Tensor)])

    library = torch.library.Library("qc", "IMPL")
    for name, shapes in (("enter", marked), ("leave", marked), ("repeat", repeated)):
        torch.library.register_fake(f"qc::{name}", shapes, lib=library, allow_override=True)
    try:
        yield
    finally:
        library._destroy()


# ---------------------------------------------------------------- in the exported program


def body_of(module: fx.GraphModule, group: int) -> tuple[fx.Node, list[fx.Node], fx.Node]:
    """Return the mark before the first layer of a group, its calls, and the mark after it."""
    nodes = list(module.graph.nodes)
    marks = {node.target: n for n, node in enumerate(nodes) if is_mark(node, group)}
    enter, leave = marks[torch.ops.qc.enter.default], marks[torch.ops.qc.leave.default]
    return nodes[enter], nodes[enter + 1 : leave], nodes[leave]


def is_mark(node: fx.Node, group: int | None = None) -> bool:
    """Say whether a node marks the start or the end of a first layer."""
    marks = (torch.ops.qc.enter.default, torch.ops.qc.leave.default)
    return node.target in marks and group in (None, node.args[0])


def is_repeat(node: fx.Node) -> bool:
    """Say whether a node stands for a layer that was not traced."""
    return node.target is torch.ops.qc.repeat.default
