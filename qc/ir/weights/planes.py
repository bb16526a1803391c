"""Bit planes: each weight is a sum of few-valued planes, each with a coefficient a tile.

With the coefficients c_p and the offset z of a weight's tile, and its digit in plane p:

    planes   w = z + sum_p c_p b_p             b in 0, 1
    signs    w = z + sum_p c_p (2 b_p - 1)     b in 0, 1: binary coding
    trits    w = z + sum_p c_p (t_p - 1)       t in 0, 1, 2

The coefficients of the planes are free, so the levels need not be evenly spaced. 0/1 planes have an
offset unless they are printed with ·nooffset; the others have none unless printed with ·offset.
Bits are stored one plane after the other, each row of a plane from a new byte; trits five to a byte
(8/5 bits, as in ternary.py), or as 2-bit fields (·2bit): more memory, less arithmetic.
With an offset, signs and 0/1 planes hold the same matrices: c' = 2 c and z' = z - sum_p c_p.

Sources: ELUTQ (arXiv 2510.19482), hierarchical linear quantization, for 0/1 planes fitted by
alternating least squares; ABQ-LLM (arXiv 2408.08554) for the same planes with uniform steps; GPTQT
(arXiv 2407.02891) and PTQ1.61 (arXiv 2502.13179) for signs; PTQTP (arXiv 2509.16989) for trits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from qc.ir.weights.expression import Const, Expr, Load, ToFloat, total
from qc.ir.weights.notation import refuse_rest, take_tile, take_word
from qc.ir.weights.packing import code_at, pack_codes, row_bytes, unpack_codes
from qc.ir.weights.ternary import TRITS, pack_trits, third_digit, trits_of_bytes
from qc.ir.weights.tiles import Tile
from qc.ir.weights.weight import ArraySpec, Term, TermFormat

Alphabet = Literal["bits", "signs", "trits"]
Packing = Literal["base3", "fields"]

ALPHABETS: dict[str, tuple[int, ...]] = {"bits": (0, 1), "signs": (-1, 1), "trits": (-1, 0, 1)}
"""What the digits 0, 1 (and 2) of a plane mean."""

HEADS: dict[str, Alphabet] = {"planes": "bits", "signs": "signs", "trits": "trits"}

MOST_LEVELS = 256
"""Levels that a tile may have: beyond, codes of integers say the same in less."""

ROUNDS = 10
"""Rounds of the alternating fit; ELUTQ takes 10, and on Gaussian tiles 20 gain less than 1%."""

ELEMENTS_AT_ONCE = 1 << 19
"""Weights that are fitted together: bounds the float64 copy of their planes."""

STAY = 1e-6
"""Weight of staying at the coefficients before, against the weight of a tile: see `refit`."""


@dataclass(frozen=True)
class PlanesFormat(TermFormat):
    """`group` inputs x `tile_rows` outputs share the coefficients; None means all of them."""

    planes: int
    alphabet: Alphabet = "bits"
    group: int | None = None
    offset: Literal["stored", "none"] = "stored"
    tile_rows: int | None = 1
    packing: Packing = "base3"

    examples: ClassVar[tuple[str, ...]] = (
        "planes2·g128", "planes3·g64", "planes4·row", "planes2·t16x16·nooffset",
        "signs1·row·offset", "signs2·g128", "trits2·g64", "trits1·g32·offset·2bit",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.planes < 1 or len(ALPHABETS[self.alphabet]) ** self.planes > MOST_LEVELS:
            raise ValueError(
                f"{self.planes} {self.alphabet} planes: 1 plane at least, and at most "
                f"{MOST_LEVELS} levels (8 planes of bits or signs, 5 of trits)"
            )
        if self.packing == "fields" and self.alphabet != "trits":
            raise ValueError("only trits can be stored as 2-bit fields (·2bit)")
        Tile(self.tile_rows, self.group)

    @property
    def tile(self) -> Tile:
        return Tile(self.tile_rows, self.group)

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        grid = self.tile.grid(shape)
        stored = {
            "planes": ArraySpec((self.planes, shape[0], self.plane_bytes(shape[1])), torch.uint8),
            "coefficients": ArraySpec((self.planes, *grid), torch.float16),
        }
        if self.offset == "stored":
            stored["offset"] = ArraySpec(grid, torch.float16)
        return stored

    def plane_bytes(self, cols: int) -> int:
        """Return the bytes of one row of one plane."""
        if self.alphabet == "trits" and self.packing == "base3":
            return -(-cols // TRITS)
        return row_bytes(cols, self.digit_bits)

    @property
    def digit_bits(self) -> int:
        """The bits of a digit that has bits of its own."""
        return 2 if self.alphabet == "trits" else 1

    def decode(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        at = self.tile.index(shape, row, col)
        parts = [
            ToFloat(self.value(Const(plane), row, col)) * Load("coefficients", (Const(plane), *at))
            for plane in range(self.planes)
        ]
        return total([*parts, Load("offset", at)] if self.offset == "stored" else parts)

    def value(self, plane: Expr, row: Expr, col: Expr) -> Expr:
        """Return what an element's digit in a plane means."""
        match self.alphabet:
            case "bits":
                return code_at("planes", (plane, row), col, 1)
            case "signs":
                return code_at("planes", (plane, row), col, 1) * 2 - 1
        if self.packing == "fields":
            return code_at("planes", (plane, row), col, 2) - 1
        return third_digit(Load("planes", (plane, row, col // TRITS)), col % TRITS) - 1

    def digits(self, shape: tuple[int, ...], packed: Tensor) -> Tensor:
        """Unpack the digits of all planes: u8[planes, out, in]."""
        rows = packed.flatten(0, 1)
        if self.alphabet == "trits" and self.packing == "base3":
            single = trits_of_bytes()[rows.long()].flatten(1)[:, : shape[1]]
        else:
            single = unpack_codes(rows, self.digit_bits, shape[1])
        planes: Tensor = single.unflatten(0, (self.planes, shape[0]))
        return planes

    def pack(self, digits: Tensor) -> Tensor:
        """Invert `digits`."""
        rows = digits.flatten(0, 1)
        if self.alphabet == "trits" and self.packing == "base3":
            packed = pack_trits(rows)
        else:
            packed = pack_codes(rows, self.digit_bits)
        planes: Tensor = packed.unflatten(0, digits.shape[:2])
        return planes

    def dense(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Tensor:
        low, step = ALPHABETS[self.alphabet][0], 2 if self.alphabet == "signs" else 1
        values = self.digits(shape, arrays["planes"]).float().mul_(step).add_(low)
        dense = torch.zeros(shape)
        for plane, coefficients in zip(values, arrays["coefficients"], strict=True):
            dense += plane * self.tile.spread(coefficients, shape)
        if self.offset == "stored":
            dense += self.tile.spread(arrays["offset"], shape)
        return dense

    def verify(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> None:
        if self.alphabet == "trits" and bool((self.digits(shape, arrays["planes"]) > 2).any()):
            raise ValueError(f"array 'planes' of {self} holds a code that no trit has")

    def rows(self, term: Term, index: Tensor) -> Term | None:
        if self.tile_rows != 1:
            return None
        kept = {
            name: array[index] if name == "offset" else array[:, index]
            for name, array in term.stored.items()
        }
        return self.term((len(index), term.shape[1]), kept)

    def nearest(self, values: Tensor) -> Term:
        """Fit coefficients and digits alternately, starting at the grid over a tile's extremes.

        Ten rounds of: each weight to the nearest level; coefficients and offset by least squares.
        Never worse than the even grid, for it starts there. The digits are chosen last, with the
        coefficients as they are stored. Minimises the squared error of each tile (a local minimum).
        Source: ELUTQ, hierarchical linear quantization, for any alphabet.
        """
        design = self.design()
        digits, fitted = [], []
        for band in self.bands(values):
            tiles, weights = self.tiles(band.float()), self.tiles(torch.ones(band.shape))
            start = self.even(tiles, weights)
            coefficients = fit(tiles, weights, design, start).half()
            number = nearest_level(tiles, coefficients.float() @ design.T)
            digits.append(self.untiled(number, tuple(band.shape)))
            fitted.append(coefficients.unflatten(0, self.tile.grid(tuple(band.shape))))
        return planes_term(self, self.digits_of(torch.cat(digits)), torch.cat(fitted))

    def design(self) -> Tensor:
        """Return the factors of coefficients and offset in each level: f32[levels, planes (+ 1)].

        Levels are numbered by their digits, the last plane's the lowest.
        """
        levels = combinations(self.alphabet, self.planes)
        if self.offset == "none":
            return levels
        return torch.cat([levels, torch.ones(len(levels), 1)], 1)

    def digits_of(self, number: Tensor) -> Tensor:
        """Return the digits of numbered levels: u8[planes, ...]."""
        base = len(ALPHABETS[self.alphabet])
        places = [base**place for place in reversed(range(self.planes))]
        return torch.stack([(number // place) % base for place in places]).to(torch.uint8)

    def even(self, tiles: Tensor, weights: Tensor) -> Tensor:
        """Return coefficients and offset of the even grid over the extremes of each tile."""
        base, letters = len(ALPHABETS[self.alphabet]), ALPHABETS[self.alphabet]
        powers = torch.tensor([float(base**plane) for plane in range(self.planes)])
        inside = weights > 0
        low = torch.where(inside, tiles, tiles.new_tensor(float("inf"))).amin(1)
        high = torch.where(inside, tiles, tiles.new_tensor(-float("inf"))).amax(1)
        span = float(powers.sum()) * (letters[-1] - letters[0])  # from the least level to the top
        if self.offset == "stored":
            offset = low - (high - low) * letters[0] / (letters[-1] - letters[0])
            return torch.cat([((high - low) / span).outer(powers), offset.unsqueeze(1)], 1)
        if self.alphabet == "bits":  # values of one sign: the extreme that is further from zero
            return (torch.where(-low > high, low, high) / span).outer(powers)
        return (torch.maximum(-low, high) * 2 / span).outer(powers)

    def bands(self, values: Tensor) -> Iterator[Tensor]:
        """Cut a matrix into bands of whole tiles."""
        rows = self.tile.size(tuple(values.shape))[0]
        at_once = max(1, ELEMENTS_AT_ONCE // max(1, rows * values.shape[1]))
        return iter(values.split(at_once * rows))

    def tiles(self, matrix: Tensor) -> Tensor:
        """View a matrix as [tiles, weights of a tile], filled up with 0."""
        return self.tile.split(matrix).transpose(1, 2).flatten(2).flatten(0, 1)

    def untiled(self, tiles: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Invert `tiles`."""
        parts: Tensor = tiles.unflatten(1, self.tile.size(shape))
        parts = parts.unflatten(0, self.tile.grid(shape))
        return parts.transpose(1, 2).flatten(2).flatten(0, 1)[: shape[0], : shape[1]]

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self | None:
        head = re.fullmatch(r"(planes|signs|trits)(\d+)", words[0])
        if head is None:
            return None
        alphabet = HEADS[head[1]]
        rest = list(words[1:])
        tile = take_tile(rest, Tile(1, None))
        word = take_word(rest, ("nooffset",) if alphabet == "bits" else ("offset",))
        packing: Packing = "fields" if take_word(rest, ("2bit",)) else "base3"
        known = "nooffset" if alphabet == "bits" else "offset"
        refuse_rest(rest, f"a group (g32, row, o32, t16x16), {known}, 2bit for trits")
        stored = (word is None) == (alphabet == "bits")
        offset: Literal["stored", "none"] = "stored" if stored else "none"
        return cls(int(head[2]), alphabet, tile.cols, offset, tile.rows, packing)

    def __str__(self) -> str:
        head = next(head for head, alphabet in HEADS.items() if alphabet == self.alphabet)
        usual = "stored" if self.alphabet == "bits" else "none"
        word = "nooffset" if self.alphabet == "bits" else "offset"
        offset = "" if self.offset == usual else f"·{word}"
        packing = "·2bit" if self.packing == "fields" else ""
        return f"{head}{self.planes}·{self.tile}{offset}{packing}"


def combinations(alphabet: Alphabet, planes: int) -> Tensor:
    """List what the digits of all planes can mean together: f32[levels, planes]."""
    return torch.tensor(list(product(ALPHABETS[alphabet], repeat=planes)), dtype=torch.float32)


def fit(
    tiles: Tensor, weights: Tensor, design: Tensor, start: Tensor, rounds: int = ROUNDS
) -> Tensor:
    """Alternate nearest levels and least squares; return coefficients [tiles, columns of design].

    tiles, weights [tiles, weights of a tile]: minimises sum weights (tiles - level)^2 in each tile.
    `weights` may be any importance, such as the diagonal of a Hessian; 0 leaves a weight out. The
    error never rises from one round to the next.
    """
    found = start
    for _ in range(rounds):
        found = refit(tiles, weights, design[nearest_level(tiles, found @ design.T)], found)
    return found


def nearest_level(tiles: Tensor, levels: Tensor) -> Tensor:
    """Return the number of the nearest level: i64[tiles, weights], levels [tiles, levels]."""
    in_order, number = levels.sort(dim=1, stable=True)
    middles = ((in_order[:, 1:] + in_order[:, :-1]) / 2).contiguous()
    return number.gather(1, torch.searchsorted(middles, tiles.contiguous()))


def refit(tiles: Tensor, weights: Tensor, chosen: Tensor, before: Tensor) -> Tensor:
    """Return the coefficients c that minimise |tiles - chosen c|^2, weighted, near those before.

    chosen [tiles, weights, columns], before [tiles, columns]. A small |c - before|^2 is added: it
    keeps a plane that no weight tells from another where it was, and the system regular. Unlike
    PTQTP's ridge, which draws to zero, it cannot make the error larger than it was.
    """
    columns, by_weight = chosen.double(), weights.double().unsqueeze(-1)
    weighted = (columns * by_weight).transpose(1, 2)
    missing = tiles.double().unsqueeze(-1) - columns @ before.double().unsqueeze(-1)
    stay = (STAY * by_weight.sum(1, keepdim=True)).clamp_min(1e-30)  # tiles of no importance
    system = weighted @ columns + stay * torch.eye(columns.shape[-1], dtype=torch.float64)
    moved = torch.linalg.solve(system, weighted @ missing)
    refitted: Tensor = before + moved.squeeze(-1).float()
    return refitted


def planes_term(format: PlanesFormat, digits: Tensor, coefficients: Tensor) -> Term:
    """Store digits u8[planes, out, in] and coefficients [tiles, tiles, planes (+ offset)]."""
    stored = {
        "planes": format.pack(digits),
        "coefficients": coefficients[..., : format.planes].movedim(-1, 0).half().contiguous(),
    }
    if format.offset == "stored":
        stored["offset"] = coefficients[..., format.planes].half().contiguous()
    return format.term(tuple(digits.shape[1:]), stored)
