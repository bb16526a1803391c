"""Turn the values of dataclass fields into plain JSON and back, trusting nothing that is read.

Numbers, texts, booleans and null stand for themselves, lists for tuples. Everything else is an
object: {"dtype": "f32"}, {"dim": "past + seq"}, {"number": "inf"}, {"torch": "strided"}, or a
record {"is": "Operand", "index": 0} with the fields of a frozen dataclass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import sympy
import torch

from qc.errors import ArtifactError, UnsupportedError, nearest
from qc.ir.dims import parse_dim
from qc.ir.ops import Operand
from qc.ir.types import (
    DTYPE_NAMES,
    DTYPES_BY_NAME,
    ActivationFormat,
    TensorType,
    TupleType,
)
from qc.ir.weights.catalog import term_formats

MOST_NESTED = 16

UNBOUNDED = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
TORCH_CONSTANTS = {
    "strided": torch.strided,
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "cpu": torch.device("cpu"),
}


@cache
def record_classes() -> dict[str, type[Any]]:
    """Return the classes that a field may hold, besides numbers and texts."""
    held = (TensorType, TupleType, ActivationFormat, Operand)
    return {**{one.__name__: one for one in held}, **term_formats()}


# ---------------------------------------------------------------- writing


def write_value(value: Any) -> Any:
    """Return `value` as plain JSON; UnsupportedError for a kind of value that has no form."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"number": str(value)}
    if isinstance(value, tuple | list):
        return [write_value(each) for each in value]
    if isinstance(value, torch.dtype) and value in DTYPE_NAMES:
        return {"dtype": DTYPE_NAMES[value]}
    if isinstance(value, sympy.Expr):
        return {"dim": write_dim(value)}
    for name, constant in TORCH_CONSTANTS.items():
        if type(value) is type(constant) and value == constant:
            return {"torch": name}
    if record_classes().get(type(value).__name__) is type(value):
        return write_record(value)
    raise UnsupportedError(f"{value!r} of type {type(value).__name__} cannot be saved")


def write_dim(dim: sympy.Expr) -> str:
    """Print a dimension so that it can be read back."""
    text = str(dim)
    try:
        if parse_dim(text) == dim:
            return text
    except ValueError:
        pass
    raise UnsupportedError(f"the size {text} cannot be saved")


def write_record(value: Any) -> dict[str, Any]:
    """Write a dataclass by the name of its class, without fields that have their default."""
    written: dict[str, Any] = {"is": type(value).__name__}
    for one in fields(value):
        content = getattr(value, one.name)
        if one.default is MISSING or content != one.default:
            written[one.name] = write_value(content)
    return written


# ---------------------------------------------------------------- reading


def read_value(content: Any, where: str, depth: int = 0) -> Any:
    """Invert `write_value`; ArtifactError says what at `where` is wrong."""
    if depth > MOST_NESTED:
        raise ArtifactError(f"{where} is nested too deeply")
    if content is None or isinstance(content, bool | int | float | str):
        return content
    if isinstance(content, list):
        return tuple(read_value(each, where, depth + 1) for each in content)
    match content:
        case {"dtype": str(name)} if name in DTYPES_BY_NAME and len(content) == 1:
            return DTYPES_BY_NAME[name]
        case {"number": str(name)} if name in UNBOUNDED and len(content) == 1:
            return UNBOUNDED[name]
        case {"torch": str(name)} if name in TORCH_CONSTANTS and len(content) == 1:
            return TORCH_CONSTANTS[name]
        case {"dim": str(text)} if len(content) == 1:
            return read_dim(text, where)
        case {"is": str()}:
            return read_record(content, record_classes(), where, depth + 1)
    raise ArtifactError(f"{where} holds {str(content)[:80]}, which is no value")


def read_dim(text: str, where: str) -> Any:
    """Read a dimension."""
    try:
        return parse_dim(text)
    except ValueError as error:
        raise ArtifactError(f"{where}: {error}") from None


def read_record(content: Any, classes: Mapping[str, type[Any]], where: str, depth: int = 0) -> Any:
    """Read a dataclass: a known class, exactly its fields, each of its type."""
    cls = read_class(content, classes, where)
    values = {
        name: read_value(each, f"{name!r} of {where}", depth)
        for name, each in content.items()
        if name != "is"
    }
    return build_record(cls, values, where)


def read_class(content: Any, classes: Mapping[str, type[Any]], where: str) -> type[Any]:
    """Return the class that a record names."""
    name = content.get("is") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise ArtifactError(f"{where} is {str(content)[:80]}, not an object that says what it is")
    if name not in classes:
        raise ArtifactError(f"{where} is an unknown {name[:60]!r}{nearest(name, classes)}")
    return classes[name]


def build_record(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """Make a `cls` of these fields, after checking names and types."""
    known = {one.name: one for one in fields(cls)}
    hints = field_types(cls)
    for name in values:
        if name not in known:
            hint = nearest(name, known)
            raise ArtifactError(f"{where}: {cls.__name__} has no field {name[:60]!r}{hint}")
    for name, one in known.items():
        is_optional = one.default is not MISSING or one.default_factory is not MISSING
        if name not in values and not is_optional:
            raise ArtifactError(f"{where}: {cls.__name__} needs the field {name!r}")
        if name in values and not fits(values[name], hints[name]):
            shown = str(values[name])[:80]
            raise ArtifactError(f"{where}: {name!r} of {cls.__name__} cannot be {shown}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: {error}") from None


@cache
def field_types(cls: Any) -> dict[str, Any]:
    """Return the declared type of every field."""
    return get_type_hints(cls)


def fits(value: Any, hint: Any) -> bool:
    """Say whether `value` is of a declared type; an int is a float, a bool is no int."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and fits_tuple(value, arguments)
    if hint is int:
        return type(value) is int
    if hint is float:
        return type(value) in (int, float)
    return isinstance(value, hint)


def fits_tuple(value: tuple[Any, ...], arguments: tuple[Any, ...]) -> bool:
    """Say whether a tuple is of the declared `tuple[X, ...]` or `tuple[X, Y]`."""
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return all(fits(each, arguments[0]) for each in value)
    return len(value) == len(arguments) and all(map(fits, value, arguments))
