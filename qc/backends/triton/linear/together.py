"""One launch for a sum of several rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qc.backends.triton.emit import Emission, combined
from qc.backends.triton.kernel import Cells, Launch
from qc.backends.triton.linear.entries import EntryLoop
from qc.backends.triton.linear.epilogue import Epilogue
from qc.backends.triton.linear.finished import SMALLEST_TILE, zeros
from qc.backends.triton.linear.loop import declare, emit_loop
from qc.backends.triton.linear.planned import Planned
from qc.backends.triton.linear.stages import EntriesOf, Stages
from qc.backends.triton.linear.tiles import Tiling

if TYPE_CHECKING:
    from qc.backends.triton.linear.rule import LinearLaunches

KNOBS = {"kind": "listed", "together": 128, "on": True, "first": 2, "entry_outputs": 128, "entry_kind": "doubled", "across": None, "ask": (), "extra": False, "turns": 8, "plain_ask": False, "rank_first": False, "at_once": False}


@dataclass
class Together:
    owner: LinearLaunches
    stages: Stages
    tiling: Tiling

    @staticmethod
    def of(owner, stages):
        loops = list(stages.loops.items())
        if not KNOBS["on"] or owner.bucket not in (16,) or not loops or not stages.steps:
            return None
        owner.alone = True
        source, looped = loops[0]
        tiling = owner.tiling([t for _, t in looped], 1, source)
        parts = owner.parts(loops, tiling)
        if parts > 1:
            owner.alone = False
            return None
        return Together(owner, stages, KNOBS.get("tiling") or tiling)

    def launch(self) -> Launch:
        owner, outer = self.owner, self.owner.linear.outer
        operand = owner.linear.operand(owner.linear.linears[0].inputs[1])
        count = -(-outer // SMALLEST_TILE)
        front = []
        for step in self.stages.steps:
            if not isinstance(step.work, EntriesOf):
                planned = owner.copy_across(step, KNOBS["across"] or 64) if step.work == "across" else owner.step(step)
                turns = planned.emission.weight(operand, "turns", torch.int32, partial(zeros, count))
                planned.emission.line(f"turns.arrive({turns})")
                front.append(planned)
        arrived = sum(p.programs for p in front)
        self.arrived = arrived
        if KNOBS["kind"] == "roles":
            roles = [self.entry_role(step, operand, count) for step in self.stages.steps if isinstance(step.work, EntriesOf)]
            front += roles
            KNOBS["entry_programs"] = sum(p.programs for p in roles)
        main = self.main(operand, count, arrived)
        roles = [each.role for each in (*front, main)]
        emission = combined("together", f"{outer} x {owner.linear.inner}", roles)
        owner.repack |= emission.repack
        programs = sum(role.cells * role.parts for role in roles)
        grid = Cells(1), Cells(programs), Cells(1)
        return emission.launch(main.rule, grid, self.tiling.warps, self.tiling.stages, KNOBS.get("regs"))

    def main(self, operand, count, arrived):
        owner, tiling, outer = self.owner, self.tiling, self.owner.linear.outer
        loops = list(self.stages.loops.items())
        emission = owner.emission("linear", tiling, outer, 1)
        works = [(self.acc_of(s), s.work) for s in self.stages.steps if isinstance(s.work, EntriesOf)]
        entry_loops = [(acc, EntryLoop(emission, w, tiling)) for acc, w in works]
        T, kind = KNOBS["together"], KNOBS["kind"]
        listed = kind in ("listed", "inloop")
        if kind == "roles":
            entry_loops = []
        blocks = tiling.outputs // 16
        for acc, loop in entry_loops:
            loop.emit_bounds()
        turns = emission.weight(operand, "turns", torch.int32, partial(zeros, count))
        at = len(emission.lines)
        def early():
            for acc, loop in entry_loops:
                columns, values = loop.stored
                total = loop.each.place.specs[f"{loop.each.place.prefix}.columns"].shape[0]
                lines = 1 << (int(total / outer * tiling.outputs * 1.2 / 64)).bit_length()
                if "entries" in KNOBS["ask"]:
                    emission.line(f"launches.ask({columns}, tl.min({loop.start}, 0), tl.max({loop.stop}, 0), {lines})")
                    emission.line(f"launches.ask({values}, tl.min({loop.start}, 0), tl.max({loop.stop}, 0), {lines})")
                self.first_entries(emission, loop, listed, T, blocks)
            if "rank" in KNOBS["ask"]:
                for source, looped in loops[1:]:
                    for _, term in looped:
                        up = term.place.stored(emission, "values")
                        n = term.place.inner
                        emission.line(f"launches.ask({up}, cell * (BN * {n}), (cell + 1) * (BN * {n}), {tiling.outputs * n * 2 // 128})")
            if "bias" in KNOBS["ask"]:
                for node in self.vectors():
                    name = self.owner_bias(emission, node)
                    emission.line(f"launches.ask({name}, cell * BN, (cell + 1) * BN, {max(1, tiling.outputs * 4 // 128)})")
        owner.early = early
        owner.emit_products(emission, *loops[0], tiling, 1)
        owner.early = None
        if kind in ("inloop", "inturn") and entry_loops:
            self.split(emission, at, turns, arrived, entry_loops[0][1])
        emission.join()
        if not (kind in ("inloop", "inturn") and entry_loops):
            emission.line(f"turns.wait({turns}, {arrived})")
        epilogue = None
        if KNOBS["extra"] == "grouped":
            epilogue = Epilogue(emission, owner.linear, {})
            for node in owner.linear.extras:
                epilogue.value(node)
        if KNOBS["rank_first"]:
            for source, looped in loops[1:]:
                emit_loop(emission, source, looped, 1, 32, [])
            loops = loops[:1]
        for acc, loop in entry_loops:
            each = loop.each
            x = declare(emission, each.source)
            columns, values = loop.stored
            if kind not in ("inloop", "inturn"):
                emission.line(f"entry_places = inputs.tile_across(tile, BM, {each.source.channels})")
            if kind == "inturn":
                first = self.steps_left
                emission.line(f"total = entries.fma_rest(total, {x}, entry_places, entry, {loop.stop}, {columns}, {values}, "
                    f"column, value, {loop.start}, {first}, {tiling.rows})")
                emission.line(f"{acc} = entries.summed({acc}, total)")
            elif listed:
                if kind == "listed":
                    emission.line(f"total = entries.cleared({acc}, {blocks})")
                emission.line(
                    f"total = entries.rest(total, {x}, entry_places, begin, count, entry, last, {columns}, {values}, "
                    f"column, value, 0, {tiling.rows})")
                emission.line(f"{acc} = entries.joined({acc}, total)")
            else:
                turns_of = f", {KNOBS['turns']}" if kind in ("static", "flat") else ""
                first = "" if kind == "flat" else f"{loop.first}[0], {loop.first}[1], "
                emission.line(
                    f"{acc} = entries.{kind}({acc}, {x}, entry_places, {loop.start}, {loop.stop}, "
                    f"{columns}, {values}, {first}{tiling.rows}, {T}{turns_of})")
        if kind == "roles":
            emission.line(f"turns.wait({turns} + 2, {KNOBS['entry_programs']})")
            for acc, scratch in self.stages.added:
                added = emission.array("added", scratch, scratch.dtype)
                emission.line(f"{acc} += products.full({added}, out, rows, {outer})")
        for source, looped in loops[1:]:
            emit_loop(emission, source, looped, 1, 32, [])
        owner.emit_epilogue(emission, owner.accs, epilogue)
        emission.line(f"turns.leave({turns}, {-(-outer // tiling.outputs)})")
        return Planned(emission, f"linear_{self.stages.rules}", tiling, outer)

    def first_entries(self, emission, loop, listed, T, blocks):
        columns, values = loop.stored
        if KNOBS["kind"] == "inturn":
            emission.line(f"entry = entries.fma_first({loop.start}, {T})")
            emission.line(f"column, value = entries.ahead(entry, {loop.stop}, {columns}, {values})")
        elif listed:
            emission.line(f"begin, count = entries.limits({loop.start}, {loop.stop}, {blocks})")
            emission.line(f"entry, last = entries.numbers({loop.start}, {loop.stop}, {blocks}, {T})")
            emission.line(f"column, value = entries.ahead(entry, last, {columns}, {values})")
        elif KNOBS["kind"] != "flat":
            loop.first = emission.bind(f"entries.first({loop.start}, {loop.stop}, {columns}, {values}, {T})")

    def vectors(self):
        from qc.backends.linear_region import is_vector
        linear = self.owner.linear
        return [n for n in linear.linears[0].inputs[2:]]

    def owner_bias(self, emission, node):
        from qc.backends.triton.linear.epilogue import decoded
        return emission.weight(self.owner.linear.operand(node), "decoded", torch.float32, decoded)

    def split(self, emission, at, turns, arrived, loop):
        """Cut the loop in two; the second takes turns of entries."""
        lines = emission.lines
        start = next(n for n in range(at, len(lines)) if lines[n].startswith("    for step in"))
        end = next((n for n in range(start + 1, len(lines)) if not lines[n].startswith("        ")), len(lines))
        body, tail = lines[start + 1 : end], lines[end:]
        steps = int(lines[start].rsplit(",", 1)[1].strip(" ):"))
        first = KNOBS["first"]
        emission.lines = lines[:start]
        emission.line(f"for step in tl.range(0, {first}):")
        emission.lines += body
        emission.join()
        emission.line(f"turns.wait({turns}, {arrived})")
        each = loop.each
        x = declare(emission, each.source)
        emission.line(f"entry_places = inputs.tile_across(tile, BM, {each.source.channels})")
        columns, values = loop.stored
        blocks = self.tiling.outputs // 16
        T = KNOBS["together"]
        self.steps_left = steps - first
        inturn = KNOBS["kind"] == "inturn"
        emission.line(f"total = products.zeros(BN, BM)")
        if inturn:
            emission.line(f"total = entries.fma_cleared(total, {T})")
        else:
            emission.line(f"total = entries.cleared(total, {blocks})")
        emission.line(f"for step in tl.range({first}, {steps}):")
        T = KNOBS["together"]
        emission.line(f"    then = entry + {T}")
        last = loop.stop if inturn else "last"
        emission.line(f"    next_column, next_value = entries.ahead(then, {last}, {columns}, {values})")
        if inturn:
            emission.line(f"    found = entries.gathered({x}, entry_places, column, {self.tiling.rows})")
        emission.lines += body
        if inturn:
            emission.line("    total = entries.fma(total, value, found)")
        else:
            emission.line(f"    total = entries.turn(total, {x}, entry_places, begin, count, entry, column, value, {self.tiling.rows})")
        emission.line("    entry = then")
        emission.line("    column = next_column")
        emission.line("    value = next_value")
        emission.lines += tail

    def entry_role(self, step, operand, count):
        owner, work = self.owner, step.work
        tiling = Tiling(KNOBS["entry_outputs"], work.tile, 4, 2)
        T = KNOBS["together"]
        emission = owner.emission("entries_alone", tiling, step.outer, 1)
        emission.line("acc0 = products.zeros(BN, BM)")
        loop = EntryLoop(emission, work, tiling)
        loop.emit_bounds()
        columns, values = loop.stored
        loop.first = emission.bind(f"entries.first({loop.start}, {loop.stop}, {columns}, {values}, {T})")
        emission.begin()
        emission.join()
        turns = emission.weight(operand, "turns", torch.int32, partial(zeros, count))
        emission.line(f"turns.wait({turns}, {self.arrived})")
        x = declare(emission, work.source)
        emission.line(f"entry_places = inputs.tile_across(tile, BM, {work.source.channels})")
        emission.line(
            f"acc0 = entries.{KNOBS['entry_kind']}(acc0, {x}, entry_places, {loop.start}, {loop.stop}, "
            f"{columns}, {values}, {loop.first}[0], {loop.first}[1], {work.tile}, {T})")
        target = emission.array("target", step.target, step.target.dtype)
        emission.line(f"places = inputs.places(rows, {step.outer}, 1, 1)")
        emission.line(f"products.store({target}, acc0, out, places, cell, {step.outer}, 1, BN)")
        emission.line(f"turns.arrive({turns} + 2)")
        return Planned(emission, "entries", tiling, step.outer)

    def acc_of(self, step):
        return next(acc for acc, target in self.stages.added if target == step.target)
