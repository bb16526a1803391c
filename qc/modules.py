"""Linears of quantized weights inside a model of one's own: a module, and the operator it calls.

    model = quantize_linears(model, "int4·g128 + rank32")    # an nn.Module, as before
    model.cuda()(x); torch.compile(model); torch.export.export(model, (x,))

The operator `qc::linear` is one node to torch.compile and torch.export. Its meaning is the product
with the decoded weight, in float32; on a CUDA device it is the kernels of the GPU backend.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from qc.errors import FormatError, ModelError
from qc.ir.ops import UNARY
from qc.ir.weights.notation import parse_weights
from qc.ir.weights.weight import Term, Weight, WeightFormat
from qc.passes.quantize.round_to_nearest import as_weight_format, round_to_nearest

__all__ = ["QuantizedLinear", "quantize_linears"]

ACTIVATIONS = tuple(UNARY)
"""What may stand behind the product."""


@torch.library.custom_op("qc::linear", mutates_args=(), device_types="cpu")
def linear(
    x: Tensor,
    arrays: Sequence[Tensor],
    format: str,
    outer: int,
    inner: int,
    bias: Tensor | None = None,
    activation: str = "",
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x W^T + bias) + residual, with x [..., inner] of a float type, which the result
    has too. `arrays` store W [outer, inner] in a format, as `arrays_of` lists them."""
    dense = weight_of(arrays, format, outer, inner).dense().float()
    result = functional.linear(x.float(), dense, None if bias is None else bias.float())
    result = UNARY[activation](result) if activation else result
    result = result if residual is None else result + residual.float()
    return result.to(x.dtype)


@linear.register_fake
def _(
    x: Tensor,
    arrays: Sequence[Tensor],
    format: str,
    outer: int,
    inner: int,
    *_: object,
    **__: object,
) -> Tensor:
    if x.shape[-1] != inner:
        raise ModelError(f"a linear of {inner} inputs does not take rows of {x.shape[-1]}")
    return x.new_empty((*x.shape[:-1], outer))


@linear.register_kernel("cuda")
def _(
    x: Tensor,
    arrays: Sequence[Tensor],
    format: str,
    outer: int,
    inner: int,
    bias: Tensor | None = None,
    activation: str = "",
    residual: Tensor | None = None,
) -> Tensor:
    from qc.backends.triton.eager import run_linear

    weight = weight_of(arrays, format, outer, inner)
    rows = x.reshape(-1, inner)
    beside = None if residual is None else residual.reshape(-1, outer)
    return run_linear(rows, weight, bias, activation, beside).reshape(*x.shape[:-1], outer)


parsed = cache(parse_weights)  # every call of a linear names its format


def weight_of(arrays: Sequence[Tensor], format: str, outer: int, inner: int) -> Weight:
    """Return the weight that some arrays store."""
    shape, left = (outer, inner), list(arrays)
    terms = []
    for each in parsed(format).terms:
        names = list(each.arrays(shape))
        taken, left = left[: len(names)], left[len(names) :]
        terms.append(Term(each, shape, dict(zip(names, taken, strict=True))))
    return Weight("weight", shape, tuple(terms))


def arrays_of(weight: Weight) -> list[tuple[str, Tensor]]:
    """List the arrays of a weight in the order that the operator expects, with names."""
    return [
        (f"term{number}_{name}".replace(".", "_"), term.arrays()[name])
        for number, term in enumerate(weight.terms)
        for name in term.format.arrays(weight.shape)
    ]


class QuantizedLinear(nn.Module):
    """A linear whose weight is stored in a format of qc. Its arrays are buffers."""

    def __init__(self, weight: Weight, bias: Tensor | None = None, activation: str = "") -> None:
        super().__init__()
        if activation and activation not in ACTIVATIONS:
            raise FormatError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
        self.out_features, self.in_features = weight.shape
        self.format, self.activation = str(weight.format), activation
        self.names = []
        for name, array in arrays_of(weight):
            self.names.append(name)
            self.register_buffer(name, array.contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def from_float(cls, source: nn.Linear, format: str | WeightFormat) -> QuantizedLinear:
        """Store the weight of a linear, rounded to nearest. FormatError where it cannot be."""
        wanted = as_weight_format(format)
        values = source.weight.detach().float().cpu()
        shape = (values.shape[0], values.shape[1])
        refused = wanted.refusal(shape)
        if refused is not None:
            raise FormatError(f"a weight {list(shape)} cannot be stored as {wanted}: {refused}")
        made = cls(Weight("weight", shape, round_to_nearest(values, wanted)), source.bias)
        return made.to(source.weight.device)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        arrays = [self.get_buffer(name) for name in self.names]
        result: Tensor = torch.ops.qc.linear(
            x, arrays, self.format, self.out_features, self.in_features, self.bias,
            self.activation, residual,
        )  # fmt: skip
        return result

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}"


def quantize_linears(
    model: nn.Module,
    format: str | WeightFormat,
    keep: Callable[[str, nn.Linear], bool] = lambda name, module: name.endswith("lm_head"),
) -> nn.Module:
    """Return a copy of a model in which every linear that `keep` does not name is stored in a
    format, rounded to nearest. FormatError names the first that cannot be.

    On a GPU a linear runs on one stream at a time: its programs count in memory beside its weights.
    """
    found = copy.deepcopy(model)
    for name, module in list(found.named_modules()):
        if not isinstance(module, nn.Linear) or keep(name, module):
            continue
        try:
            stored = QuantizedLinear.from_float(module, format)
        except FormatError as error:
            raise FormatError(f"{name}: {error.message}") from None
        if not name:
            return stored
        parent, _, attribute = name.rpartition(".")
        setattr(found.get_submodule(parent), attribute, stored)
    return found
