"""Trellis codes: a window that slides along the bits of a row names each weight.

A row is one bit stream. Step t reads the `window` bits from bit t step_bits on, little-endian: the
state s. Neighbouring states share all but `step_bits` bits, so each weight costs step_bits / dim
bits but chooses among many more levels than those could name. A step gives `dim` weights; weight k
of step t is

    w[r, t dim + k] = scale[r] table[((s MULTIPLIERS[k]) mod 2^15) >> (15 - table_bits)]

    trellis2·w12        2 bits a weight, states of 12 bits
    trellis1.5·d2·w12   3 bits for two weights

The stream of a row has window - step_bits bits more than its steps: the first state is free (no
tail biting). The table is small, and stored. Multiplying spreads the states evenly over it; on
Gaussian weights this did better than random levels for each state, as in the sources: 0.071
against 0.078 of the squared error at 2 bits and a window of 10. Products stay below 2^30.

Sources: QTIP (Tseng et al. 2024, arXiv 2406.11235), section 3, for sliding windows, hashed states;
Q-Palette (arXiv 2509.20214) for fractions of bits by two weights a step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import pi, sqrt
from typing import ClassVar, Self

import torch
from torch import Tensor

from qc.ir.weights.expression import Code, Const, Expr, Load
from qc.ir.weights.notation import refuse_rest
from qc.ir.weights.packing import pack_codes, row_bytes
from qc.ir.weights.weight import ArraySpec, Term, TermFormat

HASH_BITS = 15

MULTIPLIERS = (0x6427, 0x2257)
"""Odd numbers for the first and the second weight of a step: of 60 random ones each, those with the
least error on Gaussian rows at 2 bits, and 2.5 bits in pairs; 1, 3 and 4 bits lose up to 5%."""

FINER = 4
"""The table has 2^FINER levels for each level that the bits of a weight could name; twice as many
gain nothing at 2 bits, 2% at 3 and 4% at 4."""

STRETCH = 1.04
"""The levels reach further than the weights: of 0.96 to 1.08 best for Gaussian rows at 2 bits, and
within 2% of the best at 1, 3 and 4."""

STATES_AT_ONCE = 1 << 18
"""States of all rows that are searched together: 1 MiB of costs, which the caches hold."""


@dataclass(frozen=True)
class TrellisFormat(TermFormat):
    """`step_bits` new bits for each step of `dim` weights; `window` bits name a state."""

    step_bits: int
    dim: int = 1
    window: int = 10

    examples: ClassVar[tuple[str, ...]] = (
        "trellis2·w10", "trellis3·w9", "trellis4·w8", "trellis1·w6", "trellis1.5·d2·w9",
        "trellis2.5·d2·w8",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.dim not in (1, len(MULTIPLIERS)):
            raise ValueError(f"a step gives 1 or {len(MULTIPLIERS)} weights, not {self.dim}")
        if not self.step_bits <= self.window <= HASH_BITS:
            raise ValueError(
                f"a window has {self.step_bits} (the bits of a step) to {HASH_BITS} bits, "
                f"not {self.window}"
            )
        if not 1 <= self.step_bits <= 8:
            raise ValueError(f"a step takes 1 to 8 bits, not {self.step_bits}")

    @property
    def table_bits(self) -> int:
        """The stored levels are 2^table_bits."""
        return -(-self.step_bits // self.dim) + FINER

    def steps(self, cols: int) -> int:
        """Return the steps of a row; the last may give fewer weights."""
        return -(-cols // self.dim)

    def stream_bits(self, cols: int) -> int:
        """Return the bits of a row."""
        return (self.steps(cols) - 1) * self.step_bits + self.window

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        width = row_bytes(self.stream_bits(shape[1]), 1)
        return {
            "codes": ArraySpec((shape[0], width), torch.uint8),
            "table": ArraySpec((1 << self.table_bits,), torch.float16),
            "scale": ArraySpec((shape[0],), torch.float16),
        }

    def decode(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        state = Code("codes", (row,), col // self.dim * self.step_bits, self.window)
        factor: Expr = Const(MULTIPLIERS[0])
        if self.dim == 2:
            factor = col % 2 * (MULTIPLIERS[1] - MULTIPLIERS[0]) + MULTIPLIERS[0]
        hashed = (state * factor) & ((1 << HASH_BITS) - 1)
        level = Load("table", (hashed >> (HASH_BITS - self.table_bits),))
        return level * Load("scale", (row,))

    def entries(self, states: Tensor) -> Tensor:
        """Return the entries of the table that states name: [..., dim]."""
        hashed = (states.unsqueeze(-1) * torch.tensor(MULTIPLIERS[: self.dim])) % (1 << HASH_BITS)
        return hashed >> (HASH_BITS - self.table_bits)

    def states(self, cols: int, packed: Tensor) -> Tensor:
        """Read the windows of all steps: i64[rows, steps]."""
        position = torch.arange(self.steps(cols)) * self.step_bits
        padded = torch.nn.functional.pad(packed, (0, 2))
        word = torch.zeros((), dtype=torch.int64)
        for byte in range(3):  # 15 bits and 7 before them lie in three bytes
            word = word | (padded[:, (position >> 3) + byte].long() << (8 * byte))
        return (word >> (position & 7)) & ((1 << self.window) - 1)

    def dense(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Tensor:
        entries = self.entries(self.states(shape[1], arrays["codes"]))
        levels = arrays["table"].float()[entries].flatten(1)[:, : shape[1]]
        return levels * arrays["scale"].float().unsqueeze(1)

    def rows(self, term: Term, index: Tensor) -> Term:
        kept = {name: term.stored[name][index] for name in ("codes", "scale")}
        kept["table"] = term.stored["table"]
        return self.term((len(index), term.shape[1]), kept)

    def nearest(self, values: Tensor) -> Term:
        """Find the best path of each row through its states (Viterbi).

        The table holds the means of equally likely parts of a Gaussian; the scale of a row is its
        root mean square, stretched. Minimises the squared error of each row exactly, given the
        table and the scale as they are stored.
        """
        rows, cols = values.shape
        values = values.float()
        table = gaussian_levels(self.table_bits).half()
        scale = (values.square().mean(1).sqrt() * STRETCH).half()
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).float().unsqueeze(1)
        levels = table.float()[self.entries(torch.arange(1 << self.window))]
        at_once = max(1, STATES_AT_ONCE >> self.window)
        paths = [
            best_path(some, levels, self.step_bits) for some in (values / divisor).split(at_once)
        ]
        return trellis_term(self, (rows, cols), torch.cat(paths), table, scale)

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self | None:
        head = re.fullmatch(r"trellis(\d+(?:\.\d+)?)", words[0])
        if head is None:
            return None
        sizes = {"d": 1, "w": 10}
        rest = []
        for word in words[1:]:
            if found := re.fullmatch(r"([dw])(\d+)", word):
                sizes[found[1]] = int(found[2])
            else:
                rest.append(word)
        refuse_rest(rest, "d2 (weights a step) and w12 (bits of the window)")
        step = Fraction(head[1]) * sizes["d"]
        if step.denominator != 1:
            raise ValueError(
                f"a step takes whole bits, not {step}: {head[1]} bits a weight need "
                f"{Fraction(head[1]).denominator} weights a step (·d2)"
            )
        return cls(int(step), sizes["d"], sizes["w"])

    def __str__(self) -> str:
        dim = "" if self.dim == 1 else f"·d{self.dim}"
        return f"trellis{self.step_bits / self.dim:g}{dim}·w{self.window}"


def trellis_term(
    format: TrellisFormat, shape: tuple[int, int], states: Tensor, table: Tensor, scale: Tensor
) -> Term:
    """Store paths [rows, steps] of states, each a step after the one before."""
    window, step = format.window, format.step_bits
    first = (states[:, :1] >> torch.arange(window)) & 1
    fresh = (states[:, 1:].unsqueeze(-1) >> torch.arange(window - step, window)) & 1
    stream = torch.cat([first, fresh.flatten(1)], 1).to(torch.uint8)
    stored = {"codes": pack_codes(stream, 1), "table": table.half(), "scale": scale.half()}
    return format.term(shape, stored)


def gaussian_levels(bits: int) -> Tensor:
    """Return the means of the 2^bits equally likely parts of a normal distribution, in order.

    Between a and b it is (phi(a) - phi(b)) 2^bits, phi the density.
    """
    borders = torch.linspace(0, 1, (1 << bits) + 1, dtype=torch.float64)[1:-1]
    density = torch.exp(-torch.special.ndtri(borders).square() / 2) / sqrt(2 * pi)
    return (-torch.nn.functional.pad(density, (1, 1)).diff() * (1 << bits)).float()


def best_path(targets: Tensor, levels: Tensor, step_bits: int) -> Tensor:
    """Return the states i64[rows, steps] whose levels are nearest to targets f32[rows, cols].

    levels [states, dim]. State s follows the 2^step_bits states p with p >> step_bits = s mod
    2^(window - step_bits). Minimises the sum of squared differences exactly, by dynamic
    programming: the cheapest path into each state, step after step. Costs leave out the squares of
    the targets, which all paths share.
    """
    rows, dim = len(targets), levels.shape[1]
    shared, fresh = len(levels) >> step_bits, 1 << step_bits
    # rows go last: every operation then runs along them, whatever states it pairs
    cost, back = torch.zeros(len(levels), rows), []
    for some in targets.T.split(dim):
        before = cost.view(shared, fresh, rows)
        least, choice = before[:, 0].clone(), torch.zeros(shared, rows, dtype=torch.uint8)
        for number in range(1, fresh):
            choice.masked_fill_(before[:, number] < least, number)
            torch.minimum(least, before[:, number], out=least)
        back.append(choice)
        given = levels[:, : len(some)]  # a last step may give fewer
        cost = least + given.square().sum(1).view(fresh, shared, 1)
        for level, target in zip(given.T, some, strict=True):
            cost.view(-1, rows).addr_(level, target, alpha=-2)
    state = cost.view(-1, rows).argmin(0)
    path = [state]
    for choice in reversed(back[1:]):
        low = state % shared
        state = (low << step_bits) | choice[low, torch.arange(rows)].long()
        path.append(state)
    return torch.stack(path[::-1], 1)
