"""Run what the interpreter is needed for, and print the errors found as JSON.

A process of its own, because Triton decides whether it interprets when it is imported, for all of
its life; other tests of the same run compile. `python -m tests.backends.triton.kernel_worker` with
`sampler`, `rounding`, `kernels [DTYPE]`, `model RECIPE FOLDER [CACHE [DTYPE [MACHINE]]]`,
`calibrated RECIPE FOLDER SIZES`, SIZES being JSON, or `diffusion RECIPE`.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.backends.triton import interpreted  # before triton

# isort: split

import numpy as np
import torch

import qc
from qc.backends.artifact import ArtifactFacts
from qc.backends.triton.append import append_rules
from qc.backends.triton.artifact import manifest_of
from qc.backends.triton.attention import attention_rules
from qc.backends.triton.convolution import convolution_rules
from qc.backends.triton.elements import element_rules
from qc.backends.triton.golden import golden_checks
from qc.backends.triton.interpret import install
from qc.backends.triton.lower import GpuLowering
from qc.backends.triton.rows import row_rules
from qc.backends.triton.rules import GPU_RULES
from qc.backends.triton.sampling import sampler_launches
from qc.ir.fused import Fused
from qc.ir.meaning import evaluate_nodes
from qc.ir.quantized import QuantizedTensor, code_values
from qc.ir.target import Target, computing, parse_machine
from qc.passes.calibration import Calibration
from qc.runtime.cuda.sampling import BLOCK
from qc.runtime.manifest import Code
from qc.stages import QuantizedModel, caching, resolve_recipe
from tests.backends.triton.interpreted_program import InterpretedProgram, check_golden
from tests.backends.triton.kernel_cases import CASES, HALVES, ROUNDED, Case
from tests.backends.triton.sampled import SAMPLED, Sampled
from tests.tiny_llama import TEXT

RULES = (*attention_rules, *append_rules, *convolution_rules, *row_rules, *element_rules)


def small_target(dtype: str = "f16", machine: str = "cuda:sm_80") -> Target:
    """A GPU of few multiprocessors, so that decoding is split into two parts and not 64."""
    target = computing(parse_machine(machine), dtype)
    assert target.gpu is not None
    return replace(target, gpu=replace(target.gpu, multiprocessors=6))


def kernel_error(case: Case, dtype: str) -> float:
    """Run one case; return its error, relative to the norm."""
    op = case.node.op
    assert isinstance(op, Fused)
    known = dict(zip(op.body.inputs, case.operands, strict=True))
    expected = evaluate_nodes(op.body.outputs, {}, case.sizes, known=known)[0]
    call = interpreted.call_of(case.node, RULES, small_target(dtype))
    found = interpreted.run(case.node, call, case.operands, case.sizes, case.rows)
    if isinstance(expected, QuantizedTensor):
        if call.in_place is not None:
            found = {name: array[:, : expected.shape[1]] for name, array in found.items()}
        wanted = code_values(expected.codes, expected.format)
        codes = code_values(found["codes"].reshape(expected.codes.shape), expected.format)
        largest = {"e4m3": wanted.abs() / 8, "e2m1": (wanted.abs() / 2).clamp_min(0.5)}
        step = largest.get(expected.format.kind, 1.0)
        off = bool(((codes - wanted).abs() > step).any())  # a border may be crossed
        factors = {name: each for name, each in expected.arrays.items() if name != "codes"}
        return off + sum(interpreted.relative(found[name], each) for name, each in factors.items())
    if call.in_place is not None:
        found = found[:, : expected.shape[1]]
    return interpreted.relative(found, expected)


def kernels(dtype: str = "f16") -> dict[str, float]:
    """Run all cases; in bfloat16, those that are stored so."""
    errors = {}
    for name, make_case in CASES.items():
        if dtype == "f16" or name in HALVES:
            torch.manual_seed(0)
            errors[name] = kernel_error(make_case(), dtype)
    return errors


def rounding() -> dict[str, float]:
    """Return the largest difference of rows that are rounded where they are made and of codes that
    are widened to float16 when they are read; both come from the same floats."""
    errors = {}
    for name in ROUNDED:
        torch.manual_seed(0)
        codes, floats = CASES[f"quantize {name}"](), CASES[f"round {name}"]()
        format = codes.node.tensor.format
        assert format is not None
        shape = codes.operands[0].shape
        arrays, found = (
            interpreted.run(
                each.node, interpreted.call_of(each.node, RULES), codes.operands, each.sizes,
                each.rows,
            )
            for each in (codes, floats)
        )  # fmt: skip
        stored = {array: value.reshape(*shape[:-1], -1) for array, value in arrays.items()}
        wanted = QuantizedTensor(format=format, **stored).dequantize().half()
        errors[name] = float((found.reshape(shape).float() - wanted.float()).abs().max())
        assert found.dtype == torch.float16
    return errors


def model(
    recipe: str, folder: str, cache: str | None = None, dtype: str = "f16",
    machine: str = "cuda:sm_80",
) -> dict[str, float]:  # fmt: skip
    """Run a model that is rounded."""
    quantized = qc.trace(folder).quantize(caching(resolve_recipe(recipe), cache))
    return model_errors(quantized, small_target(dtype, machine))


def calibrated(recipe: str, folder: str, sizes: str) -> dict[str, float]:
    """Run a model as a recipe stores it that has looked at some text."""
    data = Calibration(TEXT, num_calibration_samples=4, max_seq_length=32)
    captured = qc.trace(folder)
    return model_errors(captured.quantize(recipe, calibration=data, **json.loads(sizes)))


def diffusion(recipe: str) -> dict[str, float]:
    """Run a diffusion transformer with planted outliers, after calibration on noised images."""
    from tests.recipes.diffusion import SMALL, noised, planted

    data = Calibration([noised(4, 100 + n, SMALL)[0] for n in range(4)])
    captured = qc.trace(planted(SMALL), noised(2, 1, SMALL)[0])
    quantized = captured.quantize(recipe, calibration=data)
    running, errors = interpreted_model(quantized)
    given, _ = noised(2, 999, SMALL)
    expected = quantized(**given)["sample"]
    found = running.artifact()(**{name: value.numpy() for name, value in given.items()})
    return {**errors, "sample": interpreted.relative(found, expected)}


def model_errors(quantized: QuantizedModel, target: Target | None = None) -> dict[str, float]:
    """Run the golden checks, a prompt, and tokens one by one, against the graph."""
    running, errors = interpreted_model(quantized, target)
    ids = [1, 5, 200, 7, 9, 30, 4, 4, 100, 12, 13]
    expected = quantized(input_ids=torch.tensor([ids]))["logits"][0]
    artifact = running.artifact()
    errors["prompt"] = interpreted.relative(artifact(ids), expected)
    session = artifact.session()
    found = [session.prefill(ids[:-3]), *(session.step(i) for i in ids[-3:])]
    errors["steps"] = interpreted.relative(np.concatenate(found), expected[-4:])
    return errors


def interpreted_model(
    quantized: QuantizedModel, target: Target | None = None
) -> tuple[InterpretedProgram, dict[str, float]]:
    """Return a model in the interpreter, and the errors of its golden checks."""
    target = target or small_target()
    lowering = GpuLowering(quantized.lower(target).graph, target, GPU_RULES)
    program = lowering.run()
    code = {
        name: Code(
            each.function, each.num_warps,
            tuple("pointer" if p.type.startswith("*") else p.type for p in each.parameters), (),
            dict(each.constants),
        )
        for name, each in program.kernels.items()
    }  # fmt: skip
    golden = golden_checks(lowering)
    captured = quantized.captured.captured
    facts = ArtifactFacts("test", captured.eos_ids, None, captured.context_length)
    manifest = manifest_of(program, facts, False, code, golden)
    sources = {name: each.source for name, each in program.kernels.items()}
    weights = {name: compute().contiguous().numpy() for name, compute in program.arrays.items()}
    running = InterpretedProgram(manifest, sources, weights)
    errors = {
        f"golden {number}: {manifest.steps[check.steps[-1]].kernel}":
            check_golden(running, golden.arrays, check) / (check.tolerance or 1e-9)
        for number, check in enumerate(manifest.golden)
    }  # fmt: skip
    return running, errors


def sampler() -> dict[str, float]:
    """Choose tokens as a GPU would; return the share of them that differ from those chosen here."""
    random = np.random.default_rng(0)
    return {str(case): differing(case, random) for case in SAMPLED}


def differing(case: Sampled, random: np.random.Generator) -> float:
    """Run both kernels for three rows of logits."""
    logits, rows = case.logits(3, random), 3
    vocabulary = logits.shape[1]
    blocks = -(-vocabulary // BLOCK)
    best, ids, chosen = (
        interpreted.rubbish(shape, dtype)
        for shape, dtype in (
            ((rows, blocks), torch.float32), ((rows, blocks), torch.int32), ((rows,), torch.int32)
        )
    )  # fmt: skip
    alive = [True, True, False]
    settings = case.sampling.settings(np.random.default_rng(5), alive)
    values, asked = torch.from_numpy(logits), torch.from_numpy(settings)
    first, second = sampler_launches(vocabulary)
    interpreted.launch(first, [values, best, ids, 0], {"batch": rows})
    interpreted.launch(second, [values, best, ids, asked, chosen, 0], {"batch": rows})
    expected = case.sampling.choose_rows(logits, np.random.default_rng(5), alive, -7)
    found = [t if going else -7 for t, going in zip(chosen.tolist(), alive, strict=True)]
    return float(np.mean(np.array(found) != np.array(expected)))


def main(arguments: list[str]) -> dict[str, Any]:
    """Run what is asked for."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    install()
    runs: dict[str, Callable[..., dict[str, float]]] = {
        "kernels": kernels, "model": model, "calibrated": calibrated, "diffusion": diffusion,
        "sampler": sampler, "rounding": rounding,
    }  # fmt: skip
    return runs[arguments[0]](*arguments[1:])


if __name__ == "__main__":
    out = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no result
    json.dump(main(sys.argv[1:]), out)
