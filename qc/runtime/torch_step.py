"""Run a step that the compiler left to torch: one ATen operator, called by name.

torch is imported when the first such step is bound, and by nothing else in qc.runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from qc.errors import ArtifactError
from qc.runtime.expression import parse_expression
from qc.runtime.manifest import TorchStep, Value

__all__ = ["bind_torch_step"]

_REFUSED = {"aten::from_file"}  # reads files

Arrays = Callable[[int], NDArray[Any]]
"""The memory of a value, in its declared shape."""


def bind_torch_step(
    step: TorchStep, values: tuple[Value, ...], arrays: Arrays, sizes: Mapping[str, int]
) -> Callable[[Mapping[str, int]], None]:
    """Return a function that runs `step` for given symbols, writing its results where they belong.

    `sizes` are the symbols known when binding (all but "past"). Raises ArtifactError.
    """
    try:
        import torch
    except ImportError:
        raise ArtifactError(
            f"this artifact leaves {step.torch} to torch, which is not installed",
            origin=step.origin,
        ) from None
    operator = _find_operator(torch, step)

    def tensor(index: int, shape: list[Any] | None = None) -> Any:
        found = torch.from_numpy(arrays(index))
        if values[index].dtype == "bf16":
            found = found.view(torch.bfloat16)
        if shape is None:
            return found
        return found.view([parse_expression(dim)(sizes) for dim in shape])

    def fill(template: Any) -> Callable[[Mapping[str, int]], Any]:
        """Turn a template into a function of the symbols; tensors are made once."""
        if isinstance(template, list | tuple):
            parts = [fill(each) for each in template]
            return lambda symbols: [part(symbols) for part in parts]
        if isinstance(template, dict) and "symbol" in template:
            return parse_expression(template["symbol"])
        if isinstance(template, dict) and "dtype" in template:
            template = _torch_dtypes(torch)[template["dtype"]]
        elif isinstance(template, dict):
            template = tensor(template["value"], template.get("shape"))
        return lambda _: template

    args = fill(step.args)
    kwargs = {name: fill(each) for name, each in step.kwargs.items()}
    targets = [(values[index].name, tensor(index)) for index in step.writes]

    def run(symbols: Mapping[str, int]) -> None:
        with torch.inference_mode():
            try:
                found = operator(
                    *args(symbols), **{name: each(symbols) for name, each in kwargs.items()}
                )
            except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
                reason = (str(error).splitlines() or ["no reason given"])[0]
                raise ArtifactError(f"{step.torch} failed: {reason}", origin=step.origin) from None
            results = [found] if isinstance(found, torch.Tensor) else list(found)
            if len(results) != len(targets):
                raise ArtifactError(
                    f"{step.torch} gave {len(results)} results for {len(targets)} values",
                    origin=step.origin,
                )
            for result, (name, target) in zip(results, targets, strict=True):
                if result.shape != target.shape or result.dtype != target.dtype:
                    raise ArtifactError(
                        f"{step.torch} gave {result.dtype}{list(result.shape)} for value {name!r}, "
                        f"which is {target.dtype}{list(target.shape)}",
                        origin=step.origin,
                    )
                target.copy_(result)

    return run


def _find_operator(torch: Any, step: TorchStep) -> Any:
    """Look up the operator and check that its schema takes such a call."""
    name, _, overload = step.torch.removeprefix("aten::").partition(".")
    if f"aten::{name}" in _REFUSED:
        raise ArtifactError(f"an artifact may not call {step.torch}", origin=step.origin)
    try:
        operator = getattr(getattr(torch.ops.aten, name), overload or "default")
        schema = operator._schema
    except (AttributeError, RuntimeError):
        raise ArtifactError(
            f"torch {torch.__version__} has no operator {step.torch}", origin=step.origin
        ) from None
    if schema.is_mutable:
        raise ArtifactError(f"{step.torch} changes its arguments in place", origin=step.origin)
    positional = [argument for argument in schema.arguments if not argument.kwarg_only]
    known = {argument.name for argument in schema.arguments}
    if len(step.args) > len(positional) or not step.kwargs.keys() <= known:
        raise ArtifactError(f"{step.torch} does not take these arguments", origin=step.origin)
    return operator


def _torch_dtypes(torch: Any) -> dict[str, Any]:
    return {
        "f64": torch.float64,
        "f32": torch.float32,
        "f16": torch.float16,
        "bf16": torch.bfloat16,
        "i64": torch.int64,
        "i32": torch.int32,
        "i16": torch.int16,
        "i8": torch.int8,
        "u8": torch.uint8,
        "bool": torch.bool,
    }
