"""Quantized modules on a GPU, against the decoded weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qc.modules import QuantizedLinear, quantize_linears
from tests.needs import needs

pytestmark = [needs("cuda"), pytest.mark.slow]

FORMATS = ("int4·g128", "int3·g64·zero + rank8 + sparse1%", "e4m3·row", "int8·row")


@pytest.mark.parametrize("rows", [1, 7, 40, 200])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_products_on_the_gpu(
    format: str, rows: int, dtype: torch.dtype, bound: float
) -> None:  # fmt: skip
    module = QuantizedLinear.from_float(nn.Linear(512, 192), format)
    module.activation = "gelu"
    x, residual = torch.randn(rows, 512).to(dtype), torch.randn(rows, 192).to(dtype)
    expected = module(x.double(), residual.double())
    found = module.cuda()(x.cuda(), residual.cuda())
    error = (found.cpu().double() - expected).norm() / expected.norm()
    assert found.dtype == dtype
    assert float(error) <= bound


def test_new_values_are_laid_out_anew() -> None:
    first, second = (QuantizedLinear.from_float(nn.Linear(256, 64), "int4·g64") for _ in range(2))
    x = torch.randn(3, 256).half()
    expected = second(x)
    first.cuda()(x.cuda())
    first.load_state_dict(second.state_dict())
    torch.testing.assert_close(first(x.cuda()).cpu(), expected, rtol=2e-3, atol=2e-3)


def test_graphs_and_compiled_modules() -> None:
    model = quantize_linears(nn.Sequential(nn.Linear(256, 512), nn.SiLU(), nn.Linear(512, 64)),
                             "int4·g128 + rank8").cuda().half()  # fmt: skip
    x = torch.randn(4, 256, device="cuda").half()
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-2, atol=1e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = model(x)
    x.copy_(torch.randn(4, 256).half())
    graph.replay()
    torch.testing.assert_close(recorded, model(x), rtol=1e-3, atol=1e-3)
