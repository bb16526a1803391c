"""The rule for linears: any sum of terms, and what the planner fused behind it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from qc.backends.linear_region import LinearRegion, match_linear
from qc.backends.region import RESULT, ArrayArgument, Region, Repack, SizeArgument
from qc.backends.triton.emit import Emission
from qc.backends.triton.kernel import Call, Cells, Launch, Scratch, Variant
from qc.backends.triton.linear import stages as planned
from qc.backends.triton.linear.coded import Coded
from qc.backends.triton.linear.entries import Tiling, emit_entries, rows_of_tile, tiling_of
from qc.backends.triton.linear.epilogue import Epilogue
from qc.backends.triton.linear.int8 import Int8Coded
from qc.backends.triton.linear.loop import Source, Term, declare, emit_loop, step_width, tile_call
from qc.backends.triton.linear.place import Place
from qc.backends.triton.linear.stages import LONG_CHAIN, EntriesOf, Stages, Step
from qc.ir.types import Dim, as_dim

DEVICE = ("decode", "elementwise", "entries", "fragments", "inputs", "int8", "products")
BUCKETS: tuple[int | None, ...] = (4, 8, 16, 32, 64, None)
"""Rows that kernels are made for. Up to 4 rows are one bucket: a tile of a single row would not
fill the 4 bytes that an asynchronous copy takes at least, and tensor cores pad to 8 anyway; 8 rows
or more would send Triton through tensor memory on Blackwell. Listed entries are not multiplied by
tensor cores: a sum that has them has a bucket of its own for one row."""
LARGEST_TILE = 64
LEAST_COPIED = 512
"""Bytes of x that 128 threads copy at once, at least: asynchronous copies take 4 a thread."""
MOST_PARTS = 8
PROGRAMS = 2
"""Programs that every multiprocessor should have."""
LONG_LOOP = 16
"""Steps of a loop that takes longer than a second launch, which adds up what parts leave."""
LEAST_STEPS = 4
"""Steps of the loop that a part has at least: fewer do not fill the pipeline."""


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
        linear, gpu = self.linear, self.linear.region.target.gpu
        bytes = bool(planned.FAST_RULES) and gpu is not None and "int8" in gpu.products
        stages = Stages(self.rows, rows_of_tile(self.bucket), bytes)
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
        match step.work:
            case None:
                return self.copy(step)
            case "across":
                return self.copy_across(step)
            case EntriesOf() as entries:
                return self.entries(step, entries)
            case term:
                return self.product(step, term)

    def copy(self, step: Step) -> Launch:
        """Write a copy of x as plain rows."""
        tiling = self.tiling([], 1)
        emission = self.emission("copy", tiling, step.outer, 1)
        self.load_copied(emission, step.source, tiling)
        target = emission.array("target", step.target, step.target.dtype)
        emission.line(f"places = inputs.places(rows, {step.outer}, 1, 1)")
        emission.line(f"products.store({target}, acc0, out, places, {step.outer}, 1, BN)")
        return self.finish(emission, "copy", tiling, step.outer, 1, 1)

    def copy_across(self, step: Step) -> Launch:
        """Write a copy of x with the rows of each tile side by side."""
        tiling = Tiling(64, rows_of_tile(self.bucket), 4, 1)
        emission = self.emission("across", tiling, step.outer, 1)
        self.load_copied(emission, step.source, tiling)
        target = emission.array("target", step.target, step.target.dtype)
        emission.line(f"places = inputs.tile_across(0, BM, {step.outer})")
        emission.line(f"products.store({target}, acc0, out, places, {step.outer}, BM, BN)")
        return self.finish(emission, "across", tiling, step.outer, 1, 1)

    def load_copied(self, emission: Emission, source: Source, tiling: Tiling) -> None:
        """Write the load of a tile of x."""
        x = declare(emission, source)
        emission.line(f"places = inputs.places(rows, {source.stride}, 1, 1)")
        emission.line("k = tl.program_id(1) * BN")
        emission.line(f"acc0 = {tile_call(emission, source, x, 'k', tiling.outputs, False)}")

    def entries(self, step: Step, entries: EntriesOf) -> Launch:
        """Write the products of entries alone."""
        tiling = tiling_of(entries, rows_of_tile(self.bucket))
        emission = self.emission("entries_alone", tiling, step.outer, 1)
        emission.line("acc0 = products.zeros(BN, BM)")
        emit_entries(emission, entries, "acc0", tiling)
        target = emission.array("target", step.target, step.target.dtype)
        emission.line(f"places = inputs.places(rows, {step.outer}, 1, 1)")
        emission.line(f"products.store({target}, acc0, out, places, {step.outer}, 1, BN)")
        return self.finish(emission, "entries", tiling, step.outer, 1, 1)

    def product(self, step: Step, term: Term) -> Launch:
        """Write a step of a chain."""
        source = step.source
        multiple = source.before * source.after
        tiling = self.tiling([term], multiple)
        if step.parts > 1:
            tiling = replace(tiling, width=LONG_CHAIN // 4, stages=3)
        emission = self.emission("step", tiling, step.outer, multiple)
        emission.line("acc0 = products.zeros(BN, BM)")
        emit_loop(emission, source, [("acc0", term)], step.parts, tiling.width)
        target = emission.array("target", step.target, step.target.dtype)
        if step.parts > 1:
            emission.line(
                f"products.partial({target}, acc0, out, rows, part, ROWS, {step.outer}, BN)"
            )
        else:
            after = source.after
            emission.line(f"places = inputs.places(rows, {step.outer}, 1, {after})")
            emission.line(f"products.store({target}, acc0, out, places, {step.outer}, {after}, BN)")
        return self.finish(emission, "chain", tiling, step.outer, multiple, step.parts)

    def main(self, stages: Stages) -> list[Launch]:
        """Write the main launch; where it is split along the channels, and the one behind it."""
        loops = list(stages.loops.items())
        tiling = self.tiling([term for _, term in loops[0][1]] if loops else [], 1)
        outer, name = self.linear.outer, f"linear_{stages.rules}"
        accs = [f"acc{number}" for number in range(len(self.linear.linears))]
        launches = []
        parts = self.parts(loops, tiling)
        emission = self.emission("linear", tiling, outer, 1)
        if parts > 1:
            for acc in accs:
                emission.line(f"{acc} = products.zeros(BN, BM)")
            (source, looped), *loops = loops
            emit_loop(emission, source, looped, parts, tiling.width)
            partial = {
                acc: Scratch(f"{acc}_parts", torch.float32, (as_dim(self.rows * parts), outer))
                for acc in accs
            }
            for acc in accs:
                at = emission.array(f"{acc}_parts", partial[acc], torch.float32)
                emission.line(f"products.partial({at}, {acc}, out, rows, part, ROWS, {outer}, BN)")
            launches.append(self.finish(emission, name, tiling, outer, 1, parts))
            tiling = replace(tiling, outputs=32, stages=1)  # it waits rather than works
            emission = self.emission("finish", tiling, outer, 1)
            for acc in accs:
                at = emission.array(f"{acc}_parts", partial[acc], torch.float32)
                emission.line(f"{acc} = products.summed({at}, out, rows, ROWS, {parts}, {outer})")
        else:
            for acc in accs:
                emission.line(f"{acc} = products.zeros(BN, BM)")
        for source, looped in loops:
            emit_loop(emission, source, looped, 1, tiling.width)
        for number, (acc, added) in enumerate(stages.added):
            at = emission.array(f"added{number}", added, added.dtype)
            emission.line(f"{acc} += products.full({at}, out, rows, {outer})")
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
        narrowest = min((term.unit for term in terms), default=64)
        bytes = 1 if any(isinstance(term, Int8Coded) for term in terms) else 2
        rows = max(rows, LEAST_COPIED // (narrowest * bytes))
        if coded:
            return Tiling(64, rows, 4, 3, 256 if rows <= 16 else 128)
        return Tiling(32, rows, 4, 2)

    def parts(self, loops: list[tuple[Source, list[tuple[str, Term]]]], tiling: Tiling) -> int:
        """Choose among how many programs the channels of x are split."""
        if not loops or self.bucket is None:
            return 1
        source, looped = loops[0]
        gpu = getattr(self.linear.region.target, "gpu", None)
        wanted = PROGRAMS * (gpu.multiprocessors if gpu else 108)
        width = step_width(source, [term for _, term in looped], tiling.width)
        steps = -(-source.channels // width)
        if steps < LONG_LOOP:
            return 1
        programs = -(-self.linear.outer // tiling.outputs)
        parts = max(1, min(MOST_PARTS, -(-wanted // programs), steps // LEAST_STEPS))
        return -(-steps // -(-steps // parts))  # without those that would have nothing to do


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
    entries = "entries" in LinearLaunches(linear, 1).stages().rules
    buckets = (1, *BUCKETS) if entries else BUCKETS
    launches = [LinearLaunches(linear, bucket) for bucket in buckets]
    variants = tuple(each.variant() for each in launches)
    repack: dict[tuple[int, str], Repack] = {}
    for each in launches:
        repack |= each.repack
    return Call(linear.rows, variants, repack)
