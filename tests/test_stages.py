"""The printed forms of a one-block llama: every stage, and the kernels made of it.

A difference is not a fault: read it, then `pytest --update-golden`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

import qc
from qc.backends.lowering import Lowered
from qc.backends.tvm.lower import lower
from qc.backends.tvm.rules import CPU_RULES
from qc.errors import QcError
from qc.ir.target import CPUS
from qc.passes.exactness import distance
from qc.stages import CapturedModel, PlannedModel
from tests.families import build

TARGET = CPUS["x86_64-v3"]  # not the machine's: the generated code is the same everywhere
SHOWN_KERNEL = {"f32": "elementwise", "w4a16": "append", "w4": "rows"}
"""The shortest kernel of this rule is shown whole."""


@pytest.fixture(scope="module")
def captured() -> CapturedModel:
    return qc.trace(build("llama", num_hidden_layers=1))


@pytest.fixture(scope="module", params=SHOWN_KERNEL)
def planned(captured: CapturedModel, request: pytest.FixtureRequest) -> tuple[str, PlannedModel]:
    return request.param, captured.quantize(request.param).lower(TARGET)


def test_capture_is_printed(captured: CapturedModel, golden: Callable[[str, str], None]) -> None:
    golden("stages/captured.txt", f"{captured}\n")
    golden("stages/canonical.txt", f"{captured.quantize('f32').canonical}\n")


def test_stages_of_a_recipe_are_printed(
    planned: tuple[str, PlannedModel], golden: Callable[[str, str], None]
) -> None:
    recipe, model = planned
    texts = model.texts()
    golden(f"stages/{recipe}/quantized.txt", f"{model.quantized}\n")
    golden(f"stages/{recipe}/planned.txt", f"{model}\n")
    golden(f"stages/{recipe}/log.txt", texts["ir/log.txt"] + "\n")
    assert texts["ir/quantized.txt"] == str(model.quantized)
    assert texts["ir/planned.txt"] == str(model)
    assert texts["ir/captured.txt"] == str(model.quantized.captured)


@pytest.mark.fast_rules
def test_kernels_of_a_recipe_are_printed(
    planned: tuple[str, PlannedModel], golden: Callable[[str, str], None]
) -> None:
    recipe, model = planned
    program = lower(model.graph, model.target, CPU_RULES)
    golden(f"kernels/{recipe}.txt", f"{describe(program)}\n\n{shortest(program, recipe)}\n")


def describe(program: Lowered) -> str:
    """Count the kernels of each rule. Digests, which any change moves, are left out."""
    rules = Counter(kernel.rule for kernel in program.kernels.values())
    return "\n".join(f"{count} x {rule}" for rule, count in sorted(rules.items()))


def shortest(program: Lowered, recipe: str) -> str:
    """Return the code of the shortest kernel of the rule to show."""
    rule = SHOWN_KERNEL[recipe]
    found = [k.function.script() for k in program.kernels.values() if k.rule == rule]
    return min(found, key=lambda text: (len(text), text))


def test_a_stage_can_be_evaluated(captured: CapturedModel) -> None:
    ids = torch.randint(0, 128, (2, 9))
    expected = build("llama", num_hidden_layers=1)(ids).logits.detach()
    quantized = captured.quantize("f32")
    assert distance(expected, quantized(input_ids=ids)["logits"]) < 1e-5
    last = quantized({"keep": 1}, input_ids=ids)["logits"]
    assert distance(expected[:, -1:], last) < 1e-5
    with pytest.raises(QcError, match="at least one input"):
        quantized()


def test_stages_run_one_by_one(captured: CapturedModel) -> None:
    """What compile() does, by hand, for the reference target."""
    ids = torch.randint(0, 128, (2, 9))
    quantized = captured.quantize("w4")
    artifact = quantized.lower("torch").build()
    assert torch.equal(artifact(ids), quantized(input_ids=ids)["logits"])
    assert artifact.path.exists()
    assert set(artifact.stages) == {"captured", "canonical", "quantized", "planned", "log"}
