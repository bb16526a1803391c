"""Quantized linears inside a model of one's own: what the operator means, and who accepts it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qc.errors import FormatError
from qc.modules import QuantizedLinear, arrays_of, quantize_linears, weight_of
from tests.families import build

FORMATS = ("int4·g32", "int4·g32·min + rank4 + sparse2%", "e4m3·row", "signs1·row")


@pytest.mark.parametrize("format", FORMATS)
def test_a_module_multiplies_by_what_it_stores(format: str) -> None:
    source = nn.Linear(64, 24)
    module = QuantizedLinear.from_float(source, format)
    arrays = [module.get_buffer(name) for name in module.names]
    dense = weight_of(arrays, format, 24, 64).dense()
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(module(x), nn.functional.linear(x, dense, source.bias))
    assert module(x.bfloat16()).dtype == torch.bfloat16
    assert [name for name, _ in arrays_of(weight_of(arrays, format, 24, 64))] == module.names


def test_an_activation_and_a_residual_stand_behind_the_product() -> None:
    plain = QuantizedLinear.from_float(nn.Linear(64, 24), "int8·row")
    active = copy.deepcopy(plain)
    active.activation = "silu"
    x, residual = torch.randn(5, 64), torch.randn(5, 24)
    torch.testing.assert_close(active(x, residual), nn.functional.silu(plain(x)) + residual)
    with pytest.raises(FormatError, match="activation 'sulu' is not one of"):
        QuantizedLinear(weight_of([torch.zeros(4, 4)], "f32", 4, 4), activation="sulu")


def test_the_operator_is_what_torch_asks_of_one() -> None:
    module = QuantizedLinear.from_float(nn.Linear(32, 8, bias=False), "int4·g32")
    arrays = [module.get_buffer(name) for name in module.names]
    torch.library.opcheck(
        torch.ops.qc.linear.default,
        (torch.randn(3, 32), arrays, module.format, 8, 32),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_module_is_exported_and_compiled_as_one_operator() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 8))
    quantized = quantize_linears(model, "int4·g32")
    x = torch.randn(3, 32)
    exported = torch.export.export(quantized, (x,), strict=False)
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert called.count("qc.linear.default") == 2
    torch.testing.assert_close(exported.module()(x), quantized(x))
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), quantized(x))


def test_states_are_saved_and_loaded() -> None:
    first, second = (
        QuantizedLinear.from_float(nn.Linear(32, 8), "int4·g32·zero") for _ in range(2)
    )
    x = torch.randn(3, 32)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_transformers_generates_with_quantized_modules() -> None:
    model = build("llama").eval()
    quantized = quantize_linears(model, "int8·row")
    changed = [m for m in quantized.modules() if isinstance(m, QuantizedLinear)]
    assert changed
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    ids = torch.randint(0, 90, (1, 7))
    with torch.no_grad():
        near = quantized(ids).logits
        exact = model(ids).logits
    assert float((near - exact).norm() / exact.norm()) < 0.05
    made = quantized.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 10)


def test_what_cannot_be_stored_is_named() -> None:
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 4))
    with pytest.raises(FormatError, match=r"0: a weight \[8, 32\] cannot be stored as rank99"):
        quantize_linears(model, "rank99")
