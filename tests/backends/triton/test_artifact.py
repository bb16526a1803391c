"""GPU artifacts, made on a machine without a GPU: what is compiled, written and refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import qc
from qc.backends.lowering import Lowered
from qc.backends.triton.append import append_rules
from qc.backends.triton.attention import attention_rules
from qc.backends.triton.compile import compile_launch, inspect
from qc.backends.triton.convolution import convolution_rules
from qc.backends.triton.elements import element_rules
from qc.backends.triton.golden import golden_checks
from qc.backends.triton.kernel import HIDDEN_PARAMETERS, Call, Launch
from qc.backends.triton.lower import GpuLowering
from qc.backends.triton.rows import row_rules
from qc.backends.triton.rules import GPU_RULES
from qc.errors import ArtifactError, TargetError, UnsupportedError
from qc.ir import ops
from qc.ir.fused import Fused
from qc.ir.graph import Graph
from qc.ir.node import make
from qc.ir.target import GPUS, parse_machine
from qc.ir.target import ROCM as ROCM_GPUS
from qc.ir.types import ActivationFormat
from qc.passes.pipeline import Context
from qc.passes.plan import plan
from qc.runtime.cuda.verify import relative_error
from qc.runtime.manifest import CUDA, ROCM, KernelStep
from tests.backends.triton.cases import Case as Linear
from tests.backends.triton.kernel_cases import BATCH, CASES, SEQ, value
from tests.tiny_llama import llama_folder

RULES = (*attention_rules, *append_rules, *convolution_rules, *row_rules, *element_rules)
FEW = ("quantize in groups", "round in groups", "round to e2m1", "angles", "embedding",
       "append rotated", "decode", "prefill", "rotation by a factor, quantized",
       "convolution, padded")  # fmt: skip
"""A kernel of each kind."""


def launches_of(name: str, architecture: str) -> list[Launch]:
    """Return what a case launches, in all of its variants."""
    node = CASES[name]().node
    assert isinstance(node.op, Fused)
    from qc.backends.region import Region

    device = "rocm" if architecture in ROCM_GPUS else "cuda"
    region = Region(node.op.body, node.inputs, parse_machine(f"{device}:{architecture}"))
    call: Call | None = next((c for rule in RULES if (c := rule(region))), None)
    assert call is not None
    return [launch for variant in call.variants for launch in variant.launches]


def parameter_sizes(binary: bytes) -> list[int]:
    """Read the bytes of each parameter of a kernel off its machine code."""
    text = inspect(binary, "-elf")
    line = r"Ordinal\s*:\s*0x([0-9a-f]+)\s+Offset\s*:\s*0x[0-9a-f]+\s+Size\s*:\s*0x([0-9a-f]+)"
    found = re.findall(line, text)
    return [int(size, 16) for _, size in sorted((int(n, 16), size) for n, size in found)]


def check_compiled(launch: Launch, architecture: str, folder: Path) -> None:
    """Compile for an architecture; the machine code takes what a launch will pass."""
    gpu = GPUS[architecture]
    cubin = compile_launch(launch, int(architecture.removeprefix("sm_")), folder)
    assert cubin.shared_bytes <= gpu.shared
    assert cubin.spills == 0
    passed = [8 if each.type.startswith("*") else 4 for each in launch.parameters]
    assert parameter_sizes(cubin.binary) == passed + [8] * HIDDEN_PARAMETERS


@pytest.mark.parametrize("name", FEW)
def test_kernels_compile(name: str, tmp_path: Path) -> None:
    for launch in launches_of(name, "sm_90"):
        check_compiled(launch, "sm_90", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", GPUS)
def test_every_kernel_compiles_for_every_architecture(architecture: str, tmp_path: Path) -> None:
    for name in CASES:
        for launch in launches_of(name, architecture):
            check_compiled(launch, architecture, tmp_path)


def test_a_vocabulary_table_is_read_as_it_is_stored(tmp_path: Path) -> None:
    planned = qc.trace(llama_folder(tmp_path)).quantize("w4").lower("cuda:sm_90")
    arrays = GpuLowering(planned.graph, planned.target, GPU_RULES).run().arrays
    table = {name: make() for name, make in arrays.items() if "embed_tokens" in name}
    assert {array.dtype for array in table.values()} == {torch.uint8, torch.float16}
    assert max(array.numel() for array in table.values()) == 320 * 56


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:sm_80+sm_90-w4a16", "cuda:sm_90-w4", "cuda:sm_120-f32"])
def test_an_artifact_is_complete(target: str, tmp_path: Path) -> None:
    artifact = qc.compile(llama_folder(tmp_path), target, output=tmp_path / "tiny.qc")
    manifest = artifact.manifest
    assert manifest.executor == CUDA
    architectures = target.partition(":")[2].rpartition("-")[0].split("+")
    for name, code in manifest.code.items():
        built = [binary.architecture for binary in code.binaries]
        ptx = ["ptx_80"] if "sm_80" in architectures else []
        assert built == [*architectures, *ptx]
        sizes = [{"pointer": 8, "i32": 4}[kind] for kind in code.parameters]
        binary = (artifact.path / code.binaries[0].file).read_bytes()
        assert parameter_sizes(binary) == sizes + [8] * HIDDEN_PARAMETERS
        assert "triton.jit" in artifact.source(name)
    called = {step.kernel for step in manifest.steps if isinstance(step, KernelStep)}
    checked = {
        step.kernel
        for check in manifest.golden
        for step in (manifest.steps[number] for number in check.steps)
        if isinstance(step, KernelStep)
    }
    assert manifest.generate is not None
    assert called | set(manifest.generate.sampler) == manifest.code.keys()
    assert len(manifest.generate.sampler) == 2
    assert checked == called  # `qc verify` runs them all, and compares what the sampler chooses
    with pytest.raises(ArtifactError, match="runs on an NVIDIA GPU"):
        artifact([1, 2, 3])


def lowering_of(graph: Graph, target: str) -> GpuLowering:
    """Plan and lower a graph."""
    machine = parse_machine(target)
    planned = plan(machine).run(graph, Context(machine))
    lowering = GpuLowering(planned, machine, GPU_RULES)
    lowering.run()
    return lowering


def check_machine_code(lowering: GpuLowering, architecture: str, folder: Path) -> None:
    """Compile all kernels; none spills registers."""
    for name, launch in lowering.program.kernels.items():
        if not name.startswith("attention"):  # heads of 14 channels spill
            check_compiled(launch, architecture, folder)


def test_an_input_of_another_type_is_converted_once() -> None:
    from qc.ir.weights.dense import dense_weight

    x = value("x", BATCH, SEQ, 32)  # float32; products read float16
    weights = [make(ops.Parameter(dense_weight(n, torch.randn(16, 32).half()))) for n in "ab"]
    first, second = (make(ops.Linear(), x, weight) for weight in weights)
    graph = Graph((x,), (first, second), ("first", "second"))
    program = lowering_of(graph, "cuda:sm_90").program
    steps = [step for step in program.steps if isinstance(step, KernelStep)]
    written = [
        program.values[step.writes[0]].dtype for step in steps if step.kernel.startswith("convert")
    ]
    assert written == ["f16", "f32", "f32"]  # x once, and both outputs
    assert [v.dtype for v in program.values if v.kind == "output"] == ["f32", "f32"]


def test_caches_of_any_float_are_read_as_they_are_stored(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    captured = qc.trace(llama_folder(tmp_path_factory.getbasetemp()))
    for recipe, dtype in (("f32", "f32"), ("w4a16", "f16")):
        program = lowering_of(captured.quantize(recipe).graph, "cuda:sm_90").program
        caches = {value.dtype for value in program.values if value.kind == "state"}
        assert caches == {dtype}


def linears_and_all(program: Lowered[Launch]) -> tuple[list[str], int]:
    """Return the launches of linears, and how many launches there are for one token."""
    names = [
        step.kernel
        for step in program.steps
        if isinstance(step, KernelStep) and all(low == 1 for low, _ in step.when.values())
    ]
    return [name for name in names if name.startswith(("linear", "copy"))], len(names)


@pytest.mark.parametrize("target", ["cuda:sm_90", "rocm:gfx942"])
def test_linears_with_inputs_in_small_groups_are_those_with_plain_ones(
    tmp_path_factory: pytest.TempPathFactory, target: str
) -> None:
    captured = qc.trace(llama_folder(tmp_path_factory.getbasetemp()))
    (rounded, more), (plain, fewer) = (
        linears_and_all(lowering_of(captured.quantize(recipe).graph, target).program)
        for recipe in ("w4", "w4a16")
    )
    assert rounded == plain
    assert more == fewer + 2  # what attention and the gate leave, in the only layer


def rounding_linear(format: ActivationFormat) -> Graph:
    """Return a linear of float32 that is quantized."""
    x, weight = value("x", BATCH, SEQ, 64), Linear("int4·g32", 16, 64).weight("w")
    codes = make(ops.Quantize(format), x)
    return Graph((x,), (make(ops.Linear(), codes, weight),), ("y",))


def test_rounded_rows_are_stored_in_float16_whatever_they_are_made_of() -> None:
    program = lowering_of(rounding_linear(ActivationFormat(8, 32)), "cuda:sm_90").program
    steps = [step for step in program.steps if isinstance(step, KernelStep)]
    first = program.values[steps[0].writes[0]]
    assert (steps[0].kernel.partition("_")[0], first.dtype) == ("rows", "f16")


@pytest.mark.parametrize(
    ("name", "programs"),
    [
        ("quantize in groups", 6),
        ("quantize long rows", 18),  # in three pieces of 512
        ("round long rows", 18),
        ("round long rows, whole", 6),
    ],
)
def test_long_rows_are_shared_out_where_groups_are_all_that_is_seen(
    name: str, programs: int
) -> None:
    (launch,) = launches_of(name, "sm_90")
    assert launch.grid[0].count({"batch": 2, "seq": 3}) == programs


@pytest.mark.parametrize(
    "format",
    [ActivationFormat(8, 32), ActivationFormat(4), ActivationFormat(4, 16, "e2m1")],
    ids=str,
)
def test_a_row_in_which_one_code_crossed_a_border_is_right(format: ActivationFormat) -> None:
    golden = golden_checks(lowering_of(rounding_linear(format), "cuda:sm_90"))
    check = golden.checks[0]
    expected = golden.arrays[check.expected].astype(np.float64)
    found = expected.copy()
    found.flat[np.abs(found).argmax()] *= 1 - format.widest_step
    assert 0 < relative_error(found, expected) <= check.tolerance
    assert relative_error(0 * found, expected) > check.tolerance


def test_what_has_no_kernel_is_refused_before_any_work(tmp_path: Path) -> None:
    class Sorted(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sort(x).values

    with pytest.raises(UnsupportedError, match=r"aten\.sort\.\w+ has no GPU kernel"):
        qc.compile(Sorted(), "cuda:sm_90-f32", example_inputs={"x": torch.randn(2, 4)})


def test_one_program_serves_all_architectures() -> None:
    both = parse_machine("cuda:sm_120+sm_80")
    assert str(both) == "cuda:sm_80+sm_120"
    assert both.gpu is not None
    assert both.gpu.architectures == ("sm_80", "sm_120")
    assert both.gpu.products == GPUS["sm_80"].products
    assert both.gpu.shared == GPUS["sm_120"].shared
    assert replace(both.gpu, architectures=()) != GPUS["sm_80"]
    with pytest.raises(TargetError, match="did you mean"):
        parse_machine("cuda:sm_80+sm_91")
    with pytest.raises(TargetError, match="did you mean"):
        parse_machine("cuda:sm_91")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["rocm:gfx942-w4a16", "rocm:gfx942-w4"])
def test_an_artifact_for_amd_is_complete(target: str, tmp_path: Path) -> None:
    artifact = qc.compile(llama_folder(tmp_path), target, output=tmp_path / "tiny.qc")
    manifest = artifact.manifest
    assert manifest.executor == ROCM
    assert manifest.golden
    for code in manifest.code.values():
        (binary,) = code.binaries
        assert binary.architecture == "gfx942"
        assert binary.shared <= ROCM_GPUS["gfx942"].shared
        assert (artifact.path / binary.file).read_bytes().startswith(b"\x7fELF")
    with pytest.raises(ArtifactError, match="runs on an AMD GPU, and this machine has none"):
        artifact([1, 2, 3])


@pytest.mark.parametrize("name", ["angles", "quantize in groups"])
def test_kernels_compile_for_amd(name: str, tmp_path: Path) -> None:
    for launch in launches_of(name, "gfx942"):
        code = compile_launch(launch, "gfx942", tmp_path)
        assert code.binary.startswith(b"\x7fELF")
        assert code.spills == 0
        assert code.ptx == ""
        assert compile_launch(launch, "gfx942", tmp_path) == code  # from the cache


@pytest.mark.slow
def test_every_kernel_compiles_for_amd(tmp_path: Path) -> None:
    for name in CASES:
        for launch in launches_of(name, "gfx942"):
            code = compile_launch(launch, "gfx942", tmp_path)
            assert code.shared_bytes <= ROCM_GPUS["gfx942"].shared
            assert 64 * code.num_warps <= 1024
