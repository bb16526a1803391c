"""The rule for linears: any sum of terms, and what the planner fused behind it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qc.backends.linear_region import LinearRegion, match_linear
from qc.backends.region import RESULT, ArrayArgument, Region, Repack, SizeArgument
from qc.backends.triton.emit import Emission
from qc.backends.triton.kernel import Call, Cells, Launch, Scratch, Variant
from qc.backends.triton.linear.coded import Coded
from qc.backends.triton.linear.entries import emit_entries, most_rows
from qc.backends.triton.linear.epilogue import Epilogue
from qc.backends.triton.linear.loop import Source, Term, declare, emit_loop, tile_call
from qc.backends.triton.linear.place import Place
from qc.backends.triton.linear.stages import Stages, Step
from qc.ir.types import Dim, as_dim

DEVICE = ("decode", "elementwise", "entries", "fragments", "inputs", "products")
BUCKETS: tuple[int | None, ...] = (4, 8, 16, 32, None)
"""Rows that kernels are made for. Up to 4 rows are one bucket: a single row would not fill the
4 bytes that an asynchronous copy takes at least, and tensor cores pad to 8 anyway; 8 rows or more
would send Triton through tensor memory on Blackwell."""
LARGEST_TILE = 64
MOST_PARTS = 8
LEAST_STEPS = 4
"""Steps of the loop that a part has at least: fewer do not fill the pipeline."""


@dataclass(frozen=True)
class Tiling:
    """The tile of a launch: outputs x rows, and how it is run."""

    outputs: int
    rows: int
    warps: int
    stages: int


@dataclass
class LinearLaunches:
    """The launches of one region for up to `bucket` rows."""

    linear: LinearRegion
    bucket: int | None
    repack: dict[tuple[int, str], Repack] = field(default_factory=dict)

    @property
    def rows(self) -> Dim:
        return self.linear.rows

    def variant(self) -> Variant:
        """Return all launches, in order."""
        stages = self.stages()
        launches = [self.step(step) for step in stages.steps]
        return Variant(self.bucket, (*launches, *self.main(stages)))

    def stages(self) -> Stages:
        """Plan the terms of all weights."""
        stages, linear = Stages(self.rows), self.linear
        source = source_of(linear)
        for number, (node, format) in enumerate(zip(linear.linears, linear.formats, strict=True)):
            operand = linear.operand(node.inputs[1])
            for place, term in enumerate(format.terms):
                at = Place(operand, str(place), term, (linear.outer, linear.inner))
                stages.add(f"acc{number}", at, source)
        return stages

    def emission(self, name: str, tiling: Tiling, outer: int, multiple: int) -> Emission:
        """Begin a function: its tile's rows and outputs."""
        emission = Emission(name, f"{name}: {self.linear.outer} x {self.linear.inner}", DEVICE)
        emission.constants |= {"BN": tiling.outputs, "BM": tiling.rows}
        emission.size("ROWS", SizeArgument(self.rows))
        count = "ROWS" if multiple == 1 else f"ROWS * {multiple}"
        emission.line(f"rows = inputs.numbers(0, BM, {count})")
        emission.line(f"out = products.outputs(1, BN, {outer})")
        emission.line(f"block = tl.program_id(1) * {tiling.outputs // 16}")
        return emission

    def step(self, step: Step) -> Launch:
        """Write a launch in front of the main one."""
        source = step.source
        multiple = source.before * source.after
        tiling = self.tiling([step.term] if step.term else [], multiple)
        emission = self.emission("step" if step.term else "copy", tiling, step.outer, multiple)
        if step.term is None:
            x = declare(emission, source)
            emission.line(f"places = inputs.places(rows, {source.stride}, 1, 1)")
            emission.line("k = tl.program_id(1) * BN")
            emission.line(f"acc0 = {tile_call(emission, source, x, 'k', tiling.outputs, False)}")
        else:
            emission.line("acc0 = products.zeros(BN, BM)")
            emit_loop(emission, source, [("acc0", step.term)], step.parts)
        target = emission.array("target", step.target, step.target.dtype)
        if step.parts > 1:
            emission.line(
                f"products.partial({target}, acc0, out, rows, part, ROWS, {step.outer}, BN)"
            )
        else:
            emission.line(f"places = inputs.places(rows, {step.outer}, 1, {source.after})")
            emission.line(
                f"products.store({target}, acc0, out, places, {step.outer}, {source.after}, BN)"
            )
        return self.finish(emission, "chain", tiling, step.outer, multiple, step.parts)

    def main(self, stages: Stages) -> list[Launch]:
        """Write the main launch; where it is split along the channels, and the one behind it."""
        terms = [term for terms in stages.loops.values() for _, term in terms]
        tiling = self.tiling(terms, 1)
        for _, each in stages.entries:
            tiling = most_rows(tiling, each)
        outer, name = self.linear.outer, f"linear_{stages.rules}"
        accs = [f"acc{number}" for number in range(len(self.linear.linears))]
        loops = list(stages.loops.items())
        launches = []
        parts = self.parts(loops, tiling)
        emission = self.emission("linear", tiling, outer, 1)
        if parts > 1:
            for acc in accs:
                emission.line(f"{acc} = products.zeros(BN, BM)")
            (source, looped), *loops = loops
            emit_loop(emission, source, looped, parts)
            partial = {
                acc: Scratch(f"{acc}_parts", torch.float32, (as_dim(self.rows * parts), outer))
                for acc in accs
            }
            for acc in accs:
                at = emission.array(f"{acc}_parts", partial[acc], torch.float32)
                emission.line(f"products.partial({at}, {acc}, out, rows, part, ROWS, {outer}, BN)")
            launches.append(self.finish(emission, name, tiling, outer, 1, parts))
            emission = self.emission("finish", tiling, outer, 1)
            for acc in accs:
                at = emission.array(f"{acc}_parts", partial[acc], torch.float32)
                emission.line(f"{acc} = products.summed({at}, out, rows, ROWS, {parts}, {outer})")
        else:
            for acc in accs:
                emission.line(f"{acc} = products.zeros(BN, BM)")
        for source, looped in loops:
            emit_loop(emission, source, looped, 1)
        for number, (acc, added) in enumerate(stages.added):
            at = emission.array(f"added{number}", added, added.dtype)
            emission.line(f"{acc} += products.full({at}, out, rows, {outer})")
        for acc, each in stages.entries:
            emit_entries(emission, each, acc, tiling)
        self.emit_epilogue(emission, accs)
        return [*launches, self.finish(emission, name, tiling, outer, 1, 1)]

    def emit_epilogue(self, emission: Emission, accs: list[str]) -> None:
        """Write what follows the products, and the store."""
        epilogue = Epilogue(emission, self.linear, {})
        for node, acc in zip(self.linear.linears, accs, strict=True):
            epilogue.product(node, acc)
        result = epilogue.value(self.linear.region.root)
        y = emission.array("y", ArrayArgument(RESULT), torch.float16)
        emission.line(f"places = inputs.places(rows, {self.linear.outer}, 1, 1)")
        emission.line(f"products.store({y}, {result}, out, places, {self.linear.outer}, 1, BN)")

    def finish(
        self, emission: Emission, rule: str, tiling: Tiling, outer: int, multiple: int, parts: int
    ) -> Launch:
        """Close a launch."""
        self.repack |= emission.repack
        rows = Cells(as_dim(self.rows * multiple), tiling.rows)
        grid = rows, Cells(outer, tiling.outputs), Cells(parts)
        return emission.launch(rule, grid, tiling.warps, tiling.stages)

    def tiling(self, terms: list[Term], multiple: int) -> Tiling:
        """Choose the tile of a launch."""
        rows = LARGEST_TILE if self.bucket is None else self.bucket * multiple
        rows = min(LARGEST_TILE, 1 << (rows - 1).bit_length())
        coded = bool(terms) and all(isinstance(term, Coded) for term in terms)
        if coded:
            return Tiling(64, rows, 4, 4)
        return Tiling(32, rows, 4, 2)

    def parts(self, loops: list[tuple[Source, list[tuple[str, Term]]]], tiling: Tiling) -> int:
        """Choose among how many programs the channels of x are split."""
        if not loops or self.bucket is None:
            return 1
        source, looped = loops[0]
        gpu = getattr(self.linear.region.target, "gpu", None)
        wanted = 2 * (gpu.multiprocessors if gpu else 108)
        steps = -(-source.channels // max(term.width for _, term in looped))
        programs = -(-self.linear.outer // tiling.outputs)
        return max(1, min(MOST_PARTS, wanted // programs, steps // LEAST_STEPS))


def source_of(linear: LinearRegion) -> Source:
    """Return how the region's x is read."""
    operand, format = linear.operand(linear.x), linear.activation
    if format is None:
        return Source(ArrayArgument(operand), linear.inner)
    group = min(format.group or linear.inner, linear.inner)
    codes, scale = ArrayArgument(operand, "codes"), ArrayArgument(operand, "scale")
    return Source(codes, linear.inner, "quantized", scale=scale, group=group)


def linear_rule(region: Region) -> Call | None:
    """Multiply by stored matrices, then the epilogue."""
    linear = match_linear(region)
    if linear is None:
        return None
    launches = [LinearLaunches(linear, bucket) for bucket in BUCKETS]
    variants = tuple(each.variant() for each in launches)
    repack: dict[tuple[int, str], Repack] = {}
    for each in launches:
        repack |= each.repack
    return Call(linear.rows, variants, repack)
