"""A program becomes tables: sizes in C are those of the manifest, and what no device can do is
refused."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from qc.backends.device.program import DeviceProgram, expression_source
from qc.backends.tvm.build import c_compiler
from qc.errors import UnsupportedError
from qc.runtime.expression import parse_expression
from qc.runtime.manifest import (
    Generate,
    KernelStep,
    Manifest,
    Scalar,
    TargetFacts,
    TorchStep,
    Value,
    ValueArg,
)

EXPRESSIONS = (
    "seq", "7", "64*past + 3", "batch*seq - 1", "(context + 15) // 16", "-(past // 7)",
    "(past - 100) // 7", "seq**3", "2*(seq + past)*(context - 1)", "seq**0",
)  # fmt: skip
SIZES = {"batch": 1, "seq": 13, "past": 55, "context": 128, "keep": 1}


def test_sizes_in_c_are_those_of_the_manifest(tmp_path: Path) -> None:
    lines = [f'printf("%lld\\n", (long long)({expression_source(e)}));' for e in EXPRESSIONS]
    known = [f"int64_t {name} = {size}; (void){name};" for name, size in SIZES.items()]
    source = tmp_path / "sizes.c"
    source.write_text(
        "\n".join(["#include <stdio.h>", '#include "program.h"', "int main(void) {",
                   *known, *lines, "return 0; }"])
    )  # fmt: skip
    from qc.backends.device.toolchain import DEVICE, RUNTIME

    program = tmp_path / "sizes"
    include = [f"-I{DEVICE}", f"-I{RUNTIME / 'native'}"]
    subprocess.run([*c_compiler(), *include, str(source), "-o", str(program)], check=True)
    said = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    assert list(map(int, said.split())) == [parse_expression(e)(SIZES) for e in EXPRESSIONS]


def manifest() -> Manifest:
    """Return two steps that share an arena: ids -> a -> b -> logits."""
    values = (
        Value("ids", "i64", ("batch", "seq"), "input", below=50),
        Value("w", "f32", (50, 8), "weight", "w"),
        Value("k", "f16", ("batch", "context", 4), "state"),
        Value("a", "f32", ("batch", "seq", 8), "scratch"),
        Value("b", "f32", ("batch", "seq", 8), "scratch"),
        Value("logits", "f32", ("batch", "keep", 50), "output"),
    )
    steps = (
        KernelStep("one", (Scalar("past"), ValueArg(0), ValueArg(1), ValueArg(3)), (0, 1), (3,)),
        KernelStep("two", (ValueArg(3), ValueArg(2), ValueArg(4)), (3, 2), (4, 2), "layer.0"),
        KernelStep("three", (ValueArg(4, ("batch", 1, 8), "8*seq - 8"), ValueArg(5)), (4,), (5,)),
    )
    return Manifest(
        TargetFacts("cpu-f32", "x86_64", ("avx2",)),
        ("batch", "context", "keep", "past", "seq"),
        values,
        steps,
        ("ids",),
        ("logits",),
        context_length=100,
        generate=Generate("ids", "logits", eos=(2, 3), bos=1, chunk=16),
    )


def test_values_that_live_together_lie_apart() -> None:
    program = DeviceProgram(manifest())
    for plan, tokens in zip(program.plans, (1, 16), strict=True):
        places = sorted(plan.offsets[index] for index in (3, 4))
        assert places[1] - places[0] >= 8 * 4 * tokens
        assert places[1] + 8 * 4 * tokens <= plan.bytes
    assert program.state_bytes(100) == 128 * 4 * 2
    assert (program.vocabulary, program.below, program.context) == (50, 50, 100)


def test_the_source_holds_every_table() -> None:
    source = DeviceProgram(manifest()).source(4096)
    assert ".workspace = 4096," in source
    assert "const int32_t program_ends[] = {\n  2, 3,\n};" in source
    assert "const uint64_t program_weight_bytes[] = {\n  1600,\n};" in source
    assert '{"avx2", NULL}' in source
    assert source == DeviceProgram(manifest()).source(4096)


def test_weights_of_another_program_have_another_identity() -> None:
    one = manifest()
    others = [
        replace(one, target=replace(one.target, name="cpu-w4")),
        replace(
            one, values=(*one.values[:1], replace(one.values[1], dtype="f16"), *one.values[2:])
        ),
    ]
    found = {DeviceProgram(each).identity for each in (one, *others)}
    assert len(found) == 3
    assert DeviceProgram(manifest()).identity in found


def test_what_a_device_cannot_do_is_refused() -> None:
    one = manifest()
    torch_step = TorchStep("aten::cumsum", ({"value": 3}, 1), (3,), (4,), origin="layer.0")
    two_kinds = replace(one.steps[1], when={"seq": (1, 1)})
    beyond = KernelStep(
        "three", (ValueArg(4, ("batch", 2, 8), "8*seq - 8"), ValueArg(5)), (4,), (5,)
    )
    cases = {
        "stayed on torch": replace(one, steps=(one.steps[0], torch_step, one.steps[2])),
        "calls of some sizes": replace(one, steps=(one.steps[0], two_kinds, one.steps[2])),
        "generates tokens": replace(one, generate=None),
        "takes token ids and gives logits": replace(one, inputs=("ids", "mask")),
        "f32 logits": replace(one, values=(*one.values[:5], replace(one.values[5], dtype="f16"))),
        "knows no size": replace(one, symbols=(*one.symbols, "width")),
        "uses elements": replace(one, steps=(*one.steps[:2], beyond)),
    }
    for said, changed in cases.items():
        with pytest.raises(UnsupportedError, match=said):
            DeviceProgram(changed)
