"""How kept groups lie in the stream of device/kept.py, and which program takes what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qc.ir.weights.grouped import GroupedFormat
from qc.ir.weights.kept_groups import KeptGroupsFormat
from qc.ir.weights.parts import entry_rows
from qc.ir.weights.weight import Weight

OUT, GROUPS = 64, 4
"""Outputs of a slice, and groups of each in a step: 128 threads have 2 groups each, on their way
while those of the step before are multiplied. Measured on an H200, 4096 x 4096 and 14336 x 4096:
2 groups took 12.7 and 32.7 us, 4 took 7.5 and 18.8, 8 took 8.7 and 20.3."""
CODES, BITS = 16, 4
"""Codes in a word of 64 bits."""
CHANNELS = 128
"""Channels of a step where tensor cores multiply: at most 8 groups of each output."""


@dataclass(frozen=True)
class KeptLayout:
    """Where a matrix of kept groups lies. Its arrays have a size that follows from the shape: room
    for the most steps that there can be."""

    prefix: str
    format: KeptGroupsFormat
    shape: tuple[int, int]
    programs: int

    @property
    def words(self) -> int:
        """Words of 64 bits that a group has."""
        return self.format.size // CODES

    @property
    def slices(self) -> int:
        return -(-self.shape[0] // OUT)

    @property
    def most_steps(self) -> int:
        """The most steps: no output of a slice has more groups than all of the slice before, so
        what is empty is a slice of the longest row at most, and less than a step of each slice."""
        kept, longest = self.format.kept(self.shape), self.format.groups(self.shape)[1]
        return kept // (OUT * GROUPS) + -(-longest // GROUPS) + self.slices + 1

    def stream(self, weight: Weight) -> Stream:
        """Put the groups of a weight in order."""
        starts = weight.arrays()[f"{self.prefix}.starts"].long()
        counts = starts.diff()
        order = counts.argsort(descending=True, stable=True)
        more = 0, self.slices * OUT - len(order)
        counts = F.pad(counts[order], more)  # beyond the last output there is nothing
        order = F.pad(order, more, value=int(order[-1]))
        longest = counts.view(-1, OUT).amax(1)
        steps = ((longest + GROUPS - 1) // GROUPS).clamp_min(1)
        firsts = F.pad(steps.cumsum(0), (1, 0))
        assert int(firsts[-1]) <= self.most_steps
        return Stream(starts, counts, order, firsts)

    def entries(self, weight: Weight) -> tuple[Tensor, Tensor]:
        """Return which group stands where, i64[steps, GROUPS, OUT], and whether there is one; where
        there is none, the last one of that output."""
        stream = self.stream(weight)
        step = torch.arange(self.most_steps)
        cell = torch.bucketize(step, stream.firsts[1:], right=True).clamp_max(self.slices - 1)
        within = step - stream.firsts[cell]
        number = within[:, None, None] * GROUPS + torch.arange(GROUPS)[None, :, None]
        last = stream.counts.view(-1, OUT)[cell][:, None, :] - 1
        start = stream.starts[stream.order].view(-1, OUT)[cell][:, None, :]
        entry = start + torch.minimum(number, last)
        return entry.clamp(0, int(stream.starts[-1]) - 1), number <= last

    def codes(self, weight: Weight) -> Tensor:
        """Return the codes, i64[steps, GROUPS, words, OUT]."""
        stored = weight.arrays()[f"{self.prefix}.inner.codes"]
        words = stored.contiguous().view(torch.int64)
        entry, _ = self.entries(weight)
        return words[entry].permute(0, 1, 3, 2).contiguous()

    def places(self, weight: Weight) -> Tensor:
        """Return which group of x each one multiplies."""
        return weight.arrays()[f"{self.prefix}.places"][self.entries(weight)[0]].contiguous()

    def scales(self, weight: Weight) -> Tensor:
        """Return the scales, 0 where there is no group."""
        entry, exists = self.entries(weight)
        found: Tensor = weight.arrays()[f"{self.prefix}.inner.scale"].flatten()[entry] * exists
        return found

    def zeros(self, weight: Weight) -> Tensor:
        """Return the zero points."""
        return weight.arrays()[f"{self.prefix}.inner.zero"].flatten()[self.entries(weight)[0]]

    def masks(self, weight: Weight) -> Tensor:
        """Return which groups of CHANNELS channels are kept, a bit each: u8[steps, slices OUT]."""
        marks = self.marks(weight)
        return (marks << torch.arange(marks.shape[2])).sum(2).to(torch.uint8).contiguous()

    def befores(self, weight: Weight) -> Tensor:
        """Return how many groups are kept in front of those: i16[steps, slices OUT]."""
        counts = self.marks(weight).sum(2)
        return (counts.cumsum(0) - counts).to(torch.int16).contiguous()

    def marks(self, weight: Weight) -> Tensor:
        """Return 1 where a group is kept: i64[steps, slices OUT, groups of CHANNELS channels]."""
        stored, stream = weight.arrays(), self.stream(weight)
        groups, each = self.format.groups(self.shape)[1], CHANNELS // self.format.size
        dense = torch.zeros(self.shape[0], groups + -groups % each, dtype=torch.int64)
        dense[entry_rows(stream.starts), stored[f"{self.prefix}.places"].long()] = 1
        found: Tensor = dense[stream.order].view(len(stream.order), -1, each)
        return found.transpose(0, 1)

    def order(self, weight: Weight) -> Tensor:
        """Return the outputs of all slices, those that are none at the end."""
        return self.stream(weight).order.int()

    def firsts(self, weight: Weight) -> Tensor:
        """Return the first step of every slice, and the end."""
        return self.stream(weight).firsts.int()

    def limits(self, weight: Weight) -> Tensor:
        """Return the first step of every program, and the end: all have equally many, or one."""
        return self.limits_of(self.stream(weight)).int()

    def limits_of(self, stream: Stream) -> Tensor:
        total, program = int(stream.firsts[-1]), torch.arange(self.programs + 1)
        return (
            program.clamp_max(total)
            if total < self.programs
            else (program * total // self.programs)
        )

    def begins(self, weight: Weight) -> Tensor:
        """Return the slice of the first step of every program."""
        stream = self.stream(weight)
        found = torch.bucketize(self.limits_of(stream)[:-1], stream.firsts[1:], right=True)
        return found.clamp_max(self.slices - 1).int()

    def pieces(self, weight: Weight) -> Tensor:
        """Return the first program of every slice, and how many it has: i32[slices, 2]."""
        stream = self.stream(weight)
        starts = self.limits_of(stream)[1:]
        first = torch.bucketize(stream.firsts[:-1], starts, right=True)
        last = torch.bucketize(stream.firsts[1:] - 1, starts, right=True)
        return torch.stack((first, last - first + 1), 1).int()

    def turns(self, weight: Weight) -> Tensor:
        """Return what programs count in."""
        return torch.zeros(self.slices, dtype=torch.int32)


@dataclass(frozen=True)
class Stream:
    """The groups of all outputs: where those of an output start; how many the outputs of all slices
    have, most first, and which outputs they are; the first step of every slice."""

    starts: Tensor
    counts: Tensor
    order: Tensor
    firsts: Tensor


def takes(format: object) -> bool:
    """Say whether a term is groups of whole words of codes of 4 bits, each with one scale."""
    if not isinstance(format, KeptGroupsFormat) or format.size % CODES or CHANNELS % format.size:
        return False
    inner = format.inner
    if not isinstance(inner, GroupedFormat) or inner.bits_per_code != BITS:
        return False
    whole = inner.tile_rows == 1 and (inner.group is None or inner.group >= format.size)
    return whole and inner.scale is None and inner.offset in ("symmetric", "zero", "none")
