"""What a GPU computes in: bfloat16 where asked, products of small floats where it has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qc
from qc.modules import QuantizedLinear
from tests.gpu.test_gpu import relative
from tests.needs import needs
from tests.tiny_llama import llama_folder

pytestmark = [needs("cuda"), pytest.mark.slow]


@pytest.mark.parametrize("recipe", ["w4a16", "w4", "w8a16"])
def test_a_model_in_bfloat16(recipe: str, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path)
    artifact = qc.compile(folder, f"cuda-{recipe}", dtype="bf16", output=tmp_path / "tiny.qc")
    assert not artifact.verify().wrong, str(artifact.verify())
    ids = torch.randint(0, 300, (90,)).tolist()
    expected = qc.trace(folder).quantize(recipe)(input_ids=torch.tensor([ids]))["logits"][0]
    bound = 6e-2 if recipe == "w4" else 2e-2  # ten kernels, 2^-9 each; codes that flip
    assert relative(artifact(ids), expected) <= bound
    session = artifact.session()
    found = [session.prefill(ids[:70]), *(session.step(i) for i in ids[70:])]
    assert relative(np.concatenate(found), expected[69:]) <= bound


def test_bfloat16_holds_what_float16_does_not() -> None:
    module = QuantizedLinear.from_float(nn.Linear(512, 192), "int4·g128 + rank8 + sparse1%").cuda()
    x = (1e6 * torch.randn(7, 512)).bfloat16().cuda()
    expected = module.cpu()(x.cpu().double())
    found = module.cuda()(x).cpu().double()
    assert torch.isfinite(found).all()
    assert float((found - expected).norm() / expected.norm()) <= 1e-2


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_model_in_fp8(dtype: str, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path)
    artifact = qc.compile(folder, "cuda-fp8", dtype=dtype, output=tmp_path / "tiny.qc")
    if torch.cuda.get_device_capability() >= (8, 9):
        assert any("fp8" in name for name in artifact.sources), "multiplied as something else"
    assert not artifact.verify().wrong, str(artifact.verify())
    ids = torch.randint(0, 300, (90,)).tolist()
    expected = qc.trace(folder).quantize("fp8")(input_ids=torch.tensor([ids]))["logits"][0]
    # a code on the other side of a border is off by 1/16 of itself, and bfloat16 moves more of them
    assert relative(artifact(ids), expected) <= (6e-2 if dtype == "f16" else 8e-2)


def test_a_model_in_fp4(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path, 64, 192)
    artifact = qc.compile(folder, "cuda-fp4", output=tmp_path / "tiny.qc")
    native = torch.cuda.get_device_capability() >= (10, 0)
    assert any("fp4" in name for name in artifact.sources) == native
    assert not artifact.verify().wrong, str(artifact.verify())
    ids = torch.randint(0, 300, (90,)).tolist()
    expected = qc.trace(folder).quantize("fp4")(input_ids=torch.tensor([ids]))["logits"][0]
    # a code on the other side of a border is off by a third of itself, or by all of it
    assert relative(artifact(ids), expected) <= 2e-1
