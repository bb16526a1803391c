"""The rule for linears: any sum of terms, and what the planner fused behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from qc.backends.linear_region import LinearRegion, match_linear
from qc.backends.region import RESULT, ArrayArgument, Region, Repack, SizeArgument
from qc.backends.triton.emit import WHERE, Emission, combined
from qc.backends.triton.kernel import Call, Cells, Grid, Launch, Scratch, Variant
from qc.backends.triton.linear import stages as planned
from qc.backends.triton.linear import tiles
from qc.backends.triton.linear.affine import Affine
from qc.backends.triton.linear.coded import Coded
from qc.backends.triton.linear.entries import EntryLoop, emit_entries, outputs_of
from qc.backends.triton.linear.epilogue import Epilogue
from qc.backends.triton.linear.finished import FinishedAlone, Loops
from qc.backends.triton.linear.fp4 import Fp4Coded, Fp4Widened, fp4_tiling, widened_tiling
from qc.backends.triton.linear.fp8 import Fp8Coded
from qc.backends.triton.linear.gates import BehindGates
from qc.backends.triton.linear.int8 import Int8Coded
from qc.backends.triton.linear.kept import KeptGroups
from qc.backends.triton.linear.looked import Looked
from qc.backends.triton.linear.loop import Source, Term, declare, emit_loop, step_width, tile_call
from qc.backends.triton.linear.place import Place
from qc.backends.triton.linear.planned import Planned
from qc.backends.triton.linear.stages import EntriesOf, Stages, Step
from qc.backends.triton.linear.streamed import Streamed
from qc.backends.triton.linear.tiles import LARGEST, Tiling
from qc.backends.triton.storage import half_dtype
from qc.ir.node import Node
from qc.ir.types import Dim, as_dim

DEVICE = (
    "affine",
    "decode",
    "elementwise",
    "entries",
    "fp4",
    "fp8",
    "fragments",
    "inputs",
    "int8",
    "kept",
    "lanes",
    "portable",
    "products",
    "ranks",
    "streams",
    "tables",
    "turns",
)
BUCKETS: tuple[int | None, ...] = (4, 16, 32, 64, None)
"""Rows that kernels are made for. Up to 4 rows are one bucket: a tile of a single row would not
fill the 4 bytes that an asynchronous copy takes at least, and tensor cores pad to 8 anyway; 8 rows
or more would send Triton through tensor memory on Blackwell. Listed entries are not multiplied by
tensor cores: a sum that has them has a bucket of its own for one row."""
LEAST_COPIED = 512
"""Bytes of x that 128 threads copy at once, at least: asynchronous copies take 4 a thread."""
MOST_PARTS = 8
PROGRAMS = 3
"""Programs that every multiprocessor should have, measured on an H200 for up to 64 rows."""
FEW_ROWS = 16
"""Rows up to which what parts leave is little beside the weights."""
LONG_LOOP = 16
"""Steps of a loop that takes longer than a second launch, which adds up what parts leave."""
LEAST_STEPS, LEAST_STEPS_OF_MANY = 2, 8
"""Steps of the loop that a part has at least, for few rows and for many."""


@dataclass
class LinearLaunches:
    """The launches of one region for up to `bucket` rows.

    Steps that need nothing of each other, and the loop of the main launch with them, are roles of
    one launch where a tile holds all rows; what they leave is added up by a second one, which runs
    the epilogue.
    """

    linear: LinearRegion
    bucket: int | None
    repack: dict[tuple[int, str], Repack] = field(default_factory=dict)
    alone: bool = True
    """Nothing runs beside the loop."""
    crowded: bool = False
    """Programs for entries of several rows fill the GPU beside the loop."""

    @property
    def rows(self) -> Dim:
        return self.linear.rows

    def variant(self) -> Variant:
        """Return all launches, in order."""
        stages = self.stages()
        self.alone = not stages.steps
        if (streamed := Streamed.of(self, stages)) is not None:
            return Variant(self.bucket, (streamed.launch(),))
        if (alone := FinishedAlone.of(self, stages)) is not None:
            return Variant(self.bucket, (self.launched(alone.launch()),))
        if (kept := KeptGroups.alone(self, stages)) is not None:
            return Variant(self.bucket, (kept.launch(),))
        if (gated := BehindGates.of(self, stages)) is not None:
            return Variant(self.bucket, (gated.launch(),))
        works = [step.work for step in stages.steps]
        self.crowded = any(isinstance(work, EntriesOf) and work.across for work in works)
        loops = list(stages.loops.items())
        ready = stages.level_of(loops[0][0]) if loops else 0
        last = max([ready, *(stages.level(step) + 1 for step in stages.steps)]) - 1
        beside = self.bucket is not None and bool(loops) and last >= ready
        launches = []
        for level in range(last + 1):
            roles = []
            for step in stages.steps:
                if stages.level(step) == level:
                    if (kept := KeptGroups.of(self, step)) is not None:
                        launches.append(kept.launch())
                        continue
                    role = self.step(step)
                    if beside and role.holds(self.bucket):
                        roles.append(role)
                    else:
                        launches.append(self.launched(role))
            if beside and level == last:
                roles.insert(0, self.loop(stages, loops))  # it has the most to do
            launches += self.together(roles)
        return Variant(self.bucket, (*launches, *self.main(stages, loops, beside)))

    def stages(self) -> Stages:
        """Plan the terms of all weights."""
        linear, gpu = self.linear, self.linear.region.target.gpu
        known = gpu.products if gpu is not None and planned.FAST_RULES else frozenset[str]()
        rows = min(LARGEST, self.bucket or LARGEST)
        stages = Stages(self.rows, rows, known, half_dtype(linear.region.target))
        source = source_of(linear)
        for number, (node, format) in enumerate(zip(linear.linears, linear.formats, strict=True)):
            operand = linear.operand(node.inputs[1])
            for place, term in enumerate(format.terms):
                at = Place(operand, str(place), term, (linear.outer, linear.inner))
                stages.add(f"acc{number}", at, source)
        return stages

    def emission(self, name: str, tiling: Tiling, outer: int, multiple: int) -> Emission:
        """Begin a function: its tile's rows and outputs."""
        emission = self.plain_emission(name, tiling, outer, multiple)
        emission.line(f"out = products.outputs(cell, BN, {outer})")
        emission.line("block = products.first_block(cell, BN)")
        return emission

    def plain_emission(self, name: str, tiling: Tiling, outer: int, multiple: int) -> Emission:
        """Begin a function: its tile's rows."""
        emission = Emission(name, f"{name}: {outer} x {self.linear.inner}", DEVICE)
        target = self.linear.region.target
        emission.dtype = half_dtype(target)
        emission.unpacking = "portable" if target.device == "rocm" else "fragments"
        emission.prefix = f"{name}_"
        emission.constants |= {"BN": tiling.outputs, "BM": tiling.rows}
        emission.size("ROWS", SizeArgument(self.rows))
        count = "ROWS" if multiple == 1 else f"ROWS * {multiple}"
        emission.line(f"rows = inputs.numbers(tile, BM, {count})")
        emission.line(f"live = inputs.live(tile, BM, {count})")
        return emission

    def step(self, step: Step) -> Planned:
        """Write the work of a step in front of the end."""
        match step.work:
            case None:
                return self.copy(step)
            case "across":
                return self.copy_across(step)
            case EntriesOf() as entries:
                return self.entries(step, entries)
            case term:
                return self.product(step, term)

    def copy(self, step: Step) -> Planned:
        """Write a copy of x as plain rows."""
        tiling = self.tiling([], 1)
        emission = self.emission("copy", tiling, step.outer, 1)
        self.load_copied(emission, step.source, tiling)
        emission.join()
        target = emission.array("target", step.target, step.target.dtype)
        emission.line(f"places = inputs.places(rows, {step.outer}, 1, 1)")
        emission.line(
            f"products.store({target}, acc0, out, places, live, cell, {step.outer}, 1, BN)"
        )
        return Planned(emission, "copy", tiling, step.outer)

    def copy_across(self, step: Step, width: int = 64) -> Planned:
        """Write a copy of x with the rows of each tile side by side; `width` channels a program."""
        tiling = Tiling(width, step.tile, 4, 1)
        emission = self.emission("across", tiling, step.outer, 1)
        self.load_copied(emission, step.source, tiling)
        emission.join()
        target = emission.array("target", step.target, step.target.dtype)
        emission.line(f"places = inputs.tile_across(tile, BM, {step.outer})")
        emission.line(
            f"products.store({target}, acc0, out, places, live, cell, {step.outer}, BM, BN)"
        )
        return Planned(emission, "across", tiling, step.outer)

    def load_copied(self, emission: Emission, source: Source, tiling: Tiling) -> None:
        """Write the load of a tile of x."""
        if isinstance(source.values, Scratch):
            emission.join()
        x = declare(emission, source)
        emission.line(f"places = inputs.places(rows, {source.stride}, 1, 1)")
        emission.line("k = products.first_channel(cell, BN)")
        emission.line(f"acc0 = {tile_call(emission, source, x, 'k', tiling.outputs, False)}")

    def entries(self, step: Step, entries: EntriesOf) -> Planned:
        """Write the products of entries alone."""
        tiling = Tiling(outputs_of(entries), entries.tile, 4, 2)
        emission = self.emission("entries_alone", tiling, step.outer, 1)
        emission.line("acc0 = products.zeros(BN, BM)")
        emit_entries(emission, entries, "acc0", tiling)
        emission.join()
        target = emission.array("target", step.target, step.target.dtype)
        emission.line(f"places = inputs.places(rows, {step.outer}, 1, 1)")
        emission.line(
            f"products.store({target}, acc0, out, places, live, cell, {step.outer}, 1, BN)"
        )
        return Planned(emission, "entries", tiling, step.outer)

    def product(self, step: Step, term: Term) -> Planned:
        """Write a step of a chain."""
        source = step.source
        multiple = source.before * source.after
        tiling = self.tiling([term], multiple)
        if step.parts > 1:
            tiling = replace(tiling, width=step.width, stages=3)
        emission = self.emission("step", tiling, step.outer, multiple)
        emission.line("acc0 = products.zeros(BN, BM)")
        emit_loop(emission, source, [("acc0", term)], step.parts, tiling.width)
        emission.join()
        target = emission.array("target", step.target, step.target.dtype)
        if step.parts > 1:
            at = "out, rows, live, cell, part, ROWS"
            emission.line(f"products.partial({target}, acc0, {at}, {step.outer}, BN)")
        else:
            after = source.after
            emission.line(f"places = inputs.places(rows, {step.outer}, 1, {after})")
            at = f"out, places, live, cell, {step.outer}, {after}"
            emission.line(f"products.store({target}, acc0, {at}, BN)")
        return Planned(emission, "chain", tiling, step.outer, step.parts, multiple)

    @property
    def accs(self) -> list[str]:
        """The names of the accumulators, one a product."""
        return [f"acc{number}" for number in range(len(self.linear.linears))]

    def partial(self, acc: str, parts: int) -> Scratch:
        """Return where the parts of an accumulator are left."""
        shape = as_dim(self.rows * parts), self.linear.outer
        return Scratch(f"{acc}_parts", torch.float32, shape)

    def loop(self, stages: Stages, loops: Loops) -> Planned:
        """Write the loop over the channels of x, or over a part of them, without its end."""
        source, looped = loops[0]
        tiling = self.tiling([term for _, term in looped], 1, source)
        parts, outer = self.parts(loops, tiling), self.linear.outer
        emission = self.emission("linear", tiling, outer, 1)
        self.emit_products(emission, source, looped, tiling, parts)
        emission.join()
        for acc in self.accs:
            at = emission.array(f"{acc}_parts", self.partial(acc, parts), torch.float32)
            emission.line(
                f"products.partial({at}, {acc}, out, rows, live, cell, part, ROWS, {outer}, BN)"
            )
        return Planned(emission, f"linear_{stages.rules}", tiling, outer, parts)

    def summed(self, emission: Emission, acc: str, parts: int) -> str:
        """Return the statement that adds up the parts of an accumulator."""
        at = emission.array(f"{acc}_parts", self.partial(acc, parts), torch.float32)
        return f"{acc} = products.summed({at}, out, rows, ROWS, {parts}, {self.linear.outer})"

    def main(self, stages: Stages, loops: Loops, beside: bool) -> list[Launch]:
        """Write the launch that ends with the epilogue, and in front of it the one that loops over
        x, where that is split along the channels; with `beside`, the loop is written already."""
        outer = self.linear.outer
        tiling = self.tiling([], 1)
        if loops:
            tiling = self.tiling([term for _, term in loops[0][1]], 1, loops[0][0])
        parts = self.parts(loops, tiling)
        launches = []
        if parts > 1 and not beside:
            launches.append(self.launched(self.loop(stages, loops)))
        if parts > 1 or beside:
            # it waits rather than works
            tiling = replace(tiling, outputs=32, stages=1, most_programs=None)
            emission = self.emission("finish", tiling, outer, 1)
            loops = loops[1:]
            begin = [self.summed(emission, acc, parts) for acc in self.accs]
        else:
            emission = self.emission("linear", tiling, outer, 1)
            begin = []
            if loops:
                self.emit_products(emission, *loops[0], tiling, 1)
                loops = loops[1:]
            else:
                begin = [f"{acc} = products.zeros(BN, BM)" for acc in self.accs]
        for source, looped in loops:
            emit_loop(emission, source, looped, 1, tiling.width, begin)
            begin = []
        emission.join()
        for line in begin:
            emission.line(line)
        self.emit_end(emission, stages.added)
        return [
            *launches,
            self.launched(Planned(emission, f"linear_{stages.rules}", tiling, outer)),
        ]

    def cleared(self, tiling: Tiling) -> list[str]:
        """Return the statements that clear all accumulators."""
        lanes = tiling.lanes
        size = "BN, BM" if lanes == 1 else f"BN * {lanes}, BM * {lanes}"
        return [f"{acc} = products.zeros({size})" for acc in self.accs]

    def emit_end(self, emission: Emission, added: Sequence[tuple[str, Scratch]]) -> None:
        """Write what follows the main loop: what was computed beside it, then the epilogue."""
        for number, (acc, scratch) in enumerate(added):
            at = emission.array(f"added{number}", scratch, scratch.dtype)
            emission.line(f"{acc} += products.full({at}, out, rows, {self.linear.outer})")
        self.emit_epilogue(emission, self.accs)

    def emit_products(
        self, emission: Emission, source: Source, looped: list[tuple[str, Term]], tiling: Tiling,
        parts: int, entries: Sequence[tuple[str, EntriesOf]] = (), early: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Write the loop over the channels of x: accumulators from zero to their sums; `entries` of
        x are multiplied in front of it. `early` stands there, too: it needs no other launch."""
        lanes = tiling.lanes
        single = self.bucket == 1  # all rows of a tile are one
        rows, tile = ("entry_rows", replace(tiling, rows=1)) if single else ("rows", tiling)
        loops = [EntryLoop(emission, work, tile, rows) for _, work in entries]

        def load() -> None:
            for loop in loops:
                loop.emit_first()

        def multiply() -> None:
            for line in self.cleared(tiling):
                emission.line(line)
            if single and loops:
                emission.line("entry_rows = inputs.numbers(tile, 1, ROWS)")
            for number, loop in enumerate(loops):
                emission.line(f"extra{number} = products.zeros(BN, {tile.rows})")
                loop.emit_products(f"extra{number}")

        for loop in loops:
            loop.emit_bounds()
        early = (*emission.written(load), *early)
        emit_loop(
            emission, source, looped, parts, tiling.width, emission.written(multiply), lanes,
            tiling.registers, self.linear.outer, tiling.unit, early,
        )  # fmt: skip
        if lanes > 1:
            for acc in self.accs:
                emission.line(f"{acc} = lanes.joined({acc}, {lanes})")
        for number, (acc, _) in enumerate(entries):
            emission.line(f"{acc} += extra{number}")

    def load_extras(self, emission: Emission) -> dict[Node, str]:
        """Write the loads of what the epilogue reads; return the names."""
        epilogue = Epilogue(emission, self.linear, {})
        return {node: epilogue.value(node) for node in self.linear.extras}

    def emit_epilogue(
        self, emission: Emission, accs: list[str], loaded: Mapping[Node, str] | None = None
    ) -> None:  # fmt: skip
        """Write what follows the products, and the store; some operands may be `loaded`."""
        epilogue = Epilogue(emission, self.linear, dict(loaded or {}))
        for node, acc in zip(self.linear.linears, accs, strict=True):
            epilogue.product(node, acc)
        result = epilogue.value(self.linear.region.root)
        y = emission.array("y", ArrayArgument(RESULT), emission.dtype)
        emission.line(f"places = inputs.places(rows, {self.linear.outer}, 1, 1)")
        emission.line(
            f"products.store({y}, {result}, out, places, live, cell, {self.linear.outer}, 1, BN)"
        )

    def launched(self, planned: Planned) -> Launch:
        """Close a function that has a launch of its own."""
        rows = Cells(as_dim(self.rows * planned.multiple), planned.tiling.rows)
        grid = rows, Cells(planned.outer, planned.tiling.outputs), Cells(planned.parts)
        return self.launched_by(planned.emission, planned.rule, planned.tiling, grid)

    def launched_by(self, emission: Emission, rule: str, tiling: Tiling, grid: Grid) -> Launch:
        """Close a function that the programs of a grid run."""
        self.repack |= emission.repack
        for axis, name in reversed(list(enumerate(WHERE))):
            emission.lines.insert(0, f"    {name} = launches.number({axis})")
        return emission.launch(
            rule, grid, tiling.warps, tiling.stages, tiling.most_registers, tiling.most_programs
        )

    def together(self, planned: Sequence[Planned]) -> list[Launch]:
        """Close functions that share a launch."""
        if len(planned) <= 1:
            return [self.launched(each) for each in planned]
        title = f"{' + '.join(p.emission.name for p in planned)}: {self.linear.outer} x "
        roles = [each.role for each in planned]
        emission = combined("beside", f"{title}{self.linear.inner}", roles)
        self.repack |= emission.repack
        programs = sum(role.cells * role.parts for role in roles)
        warps = max(each.tiling.warps for each in planned)
        stages = max(each.tiling.stages for each in planned)
        grid = Cells(1), Cells(programs), Cells(1)
        return [emission.launch(planned[-1].rule, grid, warps, stages)]

    def tiling(self, terms: list[Term], multiple: int, source: Source | None = None) -> Tiling:
        """Choose the tile of a launch; `source` is what the main loop multiplies."""
        rows = LARGEST if self.bucket is None else self.bucket * multiple
        rows = min(LARGEST, 1 << (rows - 1).bit_length())
        if source is not None and any(isinstance(term, Fp4Coded) for term in terms):
            return fp4_tiling(rows, source.channels, len(terms))
        if source is not None and any(isinstance(term, Fp4Widened) for term in terms):
            return widened_tiling(rows, len(terms))
        coded = bool(terms) and all(isinstance(term, Coded) for term in terms)
        narrowest = min((term.unit for term in terms), default=64)
        bytes = any(isinstance(term, Int8Coded | Fp8Coded) for term in terms)
        copied = LEAST_COPIED // (narrowest * (1 if bytes else 2))
        least = max(rows, copied)
        if not coded:
            return Tiling(32, least, 4, 2)
        if bytes or source is None:
            return Tiling(64, least, 4, 3, 256 if least <= 16 else 128)
        gpu = self.linear.region.target.gpu
        found = tiles.coded_tilings(
            self.codes(terms, rows, source), gpu.architectures if gpu else ()
        )
        chosen = next(each for each in found if divides(source, terms, each))
        return replace(chosen, rows=max(chosen.rows, copied // chosen.lanes))

    def codes(self, terms: Sequence[Term], rows: int, source: Source) -> tiles.Codes:
        """Return what tiles of a loop over codes depend on."""
        outer, coded = self.linear.outer, [term for term in terms if isinstance(term, Coded)]
        made = all(isinstance(term, Affine) for term in coded)
        if made and outer >= tiles.MANY_OUTPUTS:
            rows = max(rows, tiles.FEW)
        if self.bucket is None and len(coded) == 1:
            rows = tiles.MANY
        unpacked = [term.codes if isinstance(term, Affine) else term for term in coded]
        return tiles.Codes(
            rows, outer, source.channels, sum(term.bits for term in coded),
            min(term.bits for term in coded), min(term.group for term in coded), len(coded), made,
            any(isinstance(each, Looked) for each in unpacked), self.alone,
        )  # fmt: skip

    def parts(self, loops: Loops, tiling: Tiling) -> int:
        """Choose among how many programs the channels of x are split."""
        if not loops or self.bucket is None:
            return 1
        source, looped = loops[0]
        gpu = getattr(self.linear.region.target, "gpu", None)
        multiprocessors = gpu.multiprocessors if gpu else 108
        if tiling.parts is not None:
            return tiling.parts
        width = step_width(source.channels, [term for _, term in looped], tiling.width)
        steps = -(-source.channels // width)
        programs = -(-self.linear.outer // tiling.outputs)
        many = self.bucket > FEW_ROWS or self.crowded
        if steps < LONG_LOOP or (many and programs >= multiprocessors):
            return 1
        least = LEAST_STEPS_OF_MANY if many else LEAST_STEPS
        parts = max(1, min(MOST_PARTS, -(-PROGRAMS * multiprocessors // programs), steps // least))
        return -(-steps // -(-steps // parts))  # without those that would have nothing to do


def divides(source: Source, terms: Sequence[Term], tiling: Tiling) -> bool:
    """Say whether every lane of a tile has as many whole steps as the others."""
    if tiling.lanes == 1:
        return True
    channels = source.channels // tiling.lanes
    width = step_width(channels, terms, tiling.width)
    return source.kind == "rows" and source.channels % (tiling.lanes * width) == 0


def source_of(linear: LinearRegion) -> Source:
    """Return how the region's x is read."""
    operand, format = linear.operand(linear.x), linear.activation
    if format is None:
        return Source(ArrayArgument(operand), linear.inner)
    group = min(format.group or linear.inner, linear.inner)
    codes, scale = ArrayArgument(operand, "codes"), ArrayArgument(operand, "scale")
    factor = ArrayArgument(operand, "factor") if format.kind == "e2m1" else None
    return Source(
        codes, linear.inner, "quantized", scale=scale, group=group, code=format.code, factor=factor
    )


def linear_rule(region: Region) -> Call | None:
    """Multiply by stored matrices, then the epilogue."""
    linear = match_linear(region)
    if linear is None:
        return None
    rules = LinearLaunches(linear, 1).stages().rules
    alone = any(name in rules for name in ("entries", "coded", "looked", "affine"))
    buckets = (1, *BUCKETS) if alone else BUCKETS
    launches = [LinearLaunches(linear, bucket) for bucket in buckets]
    variants = tuple(each.variant() for each in launches)
    repack: dict[tuple[int, str], Repack] = {}
    for each in launches:
        repack |= each.repack
    return Call(linear.rows, variants, repack)
