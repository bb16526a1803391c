"""check_graph(): follow the passes without values, plan, ask the kernel rules, add up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from qc.checking.cost import CompileCost, compile_cost
from qc.checking.linears import PlannedLinear, linears_of, require_kernels
from qc.checking.report import CheckedLinear, CheckReport, require_none
from qc.checking.roofline import ROWS, flat_from, speedup
from qc.ir import ops
from qc.ir.fused import Fused
from qc.ir.graph import Graph
from qc.ir.target import CODE_PRODUCTS, GPUS, ROCM, Target
from qc.ir.weights.weight import Weight
from qc.passes.pipeline import Context, Pipeline, Refusal
from qc.passes.plan import plan
from qc.passes.preview import preview


@dataclass(frozen=True)
class Expected:
    """What a compilation will come to: the planned graph and its linears, or refusals."""

    graph: Graph | None
    linears: tuple[PlannedLinear, ...] = ()
    refusals: tuple[Refusal, ...] = ()


def expected(canonical: Graph, passes: Pipeline, target: Target) -> Expected:
    """Find out what passes will make of a graph without computing values; nothing where a pass
    must read values to tell.

    UnsupportedError where a linear has no kernel.
    """
    found = preview(passes, canonical)
    if found.graph is None:
        return Expected(None, (), found.refusals)
    return planned(found.graph, target)


def planned(graph: Graph, target: Target) -> Expected:
    """Plan a quantized graph and list its linears."""
    graph = plan(target).run(graph, Context(target))
    return Expected(graph, tuple(linears_of(graph, target)))


def require_possible(canonical: Graph, passes: Pipeline, target: Target) -> None:
    """Refuse what could not be stored, or has no kernel, before any long work.

    FormatError or UnsupportedError, in one sentence.
    """
    found = preview(passes, canonical)
    require_none(found.refusals)
    if found.graph is not None and target.device != "torch":
        require_kernels(plan(target).run(found.graph, Context(target)), target)


def check_graph(canonical: Graph, passes: Pipeline, target: Target, source: str) -> CheckReport:
    """Report how every linear of a canonical graph will be compiled."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    found = expected(canonical, passes, target)
    notes = []
    if found.graph is None and not found.refusals:
        found = planned(passes.run(canonical, Context(target)), target)
        notes.append("the passes were run: one of them must read values to say what it stores")
    report = CheckReport(source, str(target), cores, refusals=found.refusals)
    if found.graph is None:
        return report
    if target.device == "torch":
        notes.append("reference interpreter, no speed-up")
    if target.gpu is not None and target.gpu.dtype == "bf16":
        notes.append("computes in bfloat16, sums in float32")
    if target.device == "rocm":
        notes.append("no kernel has run on a GPU of AMD's yet: no speed-up is promised")
    notes += small_float_notes(found.linears, target)
    notes += widened_notes(found.linears, target)
    return CheckReport(
        source,
        str(target),
        cores,
        rows=tuple(folded(found.linears, target)),
        speedups=total_speedups(found.linears, target),
        cost=cost_of(canonical, found.graph, target),
        notes=tuple(notes),
    )


def small_float_notes(linears: Sequence[PlannedLinear], target: Target) -> list[str]:
    """Say where activations of small floats meet no tensor cores that multiply them."""
    if target.gpu is None:
        return []
    wide = {"f16": "float16", "bf16": "bfloat16"}[target.gpu.dtype]
    notes = []
    for code, name in SMALL_FLOATS.items():
        reading = [x for x in linears if x.activation is not None and x.activation.kind == code]
        widened = [x for x in reading if not any(name in rule for rule in x.rules)]
        if widened:
            known = {**GPUS, **ROCM}
            product, several = CODE_PRODUCTS[code], target.gpu.architectures
            lacking = [each for each in several if product not in known[each].products]
            why = f": no products of {code} on {', '.join(lacking)}" if lacking else ""
            count = f"{len(widened)} of {len(reading)} linears"
            notes.append(f"{count} with {code} inputs multiply in {wide}{why}")
    return notes


def widened_notes(linears: Sequence[PlannedLinear], target: Target) -> list[str]:
    """Say where a GPU gains nothing from quantized activations: small groups are widened."""
    if target.gpu is None:
        return []
    reading = [x for x in linears if x.activation is not None and x.activation.kind == "int"]
    widened = [x for x in reading if not any("int8" in rule for rule in x.rules)]
    if not widened:
        return []
    return [
        f"{len(widened)} of {len(reading)} linears with {widened[0].activation} inputs multiply in "
        "floating point: inputs that are not quantized (w4a16 in place of w4) are more exact here, "
        "and no slower"
    ]


SMALL_FLOATS = {"e4m3": "fp8", "e2m1": "fp4"}
"""Codes of activations, and the rule that multiplies them."""


def folded(linears: Sequence[PlannedLinear], target: Target) -> list[CheckedLinear]:
    """Put linears of one shape, format and kernel into one row."""
    alike: dict[object, list[PlannedLinear]] = {}
    for linear in linears:
        key = (linear.weight.shape, linear.weight.format, linear.activation, linear.rules)
        alike.setdefault(key, []).append(linear)
    return [row_of(group, target) for group in alike.values()]


def row_of(group: Sequence[PlannedLinear], target: Target) -> CheckedLinear:
    """Describe linears of one shape, format and kernel."""
    first = group[0]
    work, baseline = first.work, first.baseline
    speedups, flat = {}, None
    if work is not None and baseline is not None:
        speedups = {rows: speedup(work, baseline, rows, target) for rows in ROWS}
        flat = flat_from(work, baseline, target)
    stored = {id(linear.weight): linear.weight.bits // 8 for linear in group}
    return CheckedLinear(
        tuple(linear.weight.name for linear in group),
        first.weight.shape,
        str(first.weight.format),
        "float32" if first.activation is None else str(first.activation),
        first.rules,
        sum(stored.values()),
        sum(linear.weight.bits // 8 for linear in group),
        first.weight.bits_per_element,
        speedups,
        flat,
    )


def total_speedups(linears: Sequence[PlannedLinear], target: Target) -> dict[int, float]:
    """Return the speed-up of all linears together, by rows of x; empty without predictions."""
    known = [(x.work, x.baseline) for x in linears if x.work is not None and x.baseline is not None]
    return {
        rows: sum(baseline.seconds(rows, target, 1) for _, baseline in known)
        / sum(work.seconds(rows, target, 1) for work, _ in known)
        for rows in (ROWS if known else ())
    }


def cost_of(canonical: Graph, graph: Graph, target: Target) -> CompileCost:
    """Estimate what the compilation takes."""
    before, after = weights_of(canonical), weights_of(graph)
    formats = {weight.name: weight.format for weight in before}
    changed = [w for w in after if len(w.shape) == 2 and formats.get(w.name) != w.format]
    return compile_cost(before, after, changed, kernel_count(graph, target))


def weights_of(graph: Graph) -> list[Weight]:
    """List the stored weights."""
    return [node.op.weight for node in graph.parameters if isinstance(node.op, ops.Parameter)]


def kernel_count(graph: Graph, target: Target) -> int:
    """Count the kernels that a planned graph needs: equal regions share one."""
    if target.device == "torch":
        return 0
    if target.gpu is not None:
        from qc.checking.gpu import gpu_kernel_count

        return gpu_kernel_count(graph, target)
    from qc.backends.lowering import region_key
    from qc.backends.region import region_of

    regions = (region_of(node, target) for node in graph.nodes if isinstance(node.op, Fused))
    return len({region_key(region) for region in regions})
