"""Vector codebooks: consecutive inputs of a row share codes, which name stored vectors to add.

A row is cut into vectors of `dim` consecutive weights; the last one may be shorter. Vector v of row
r has a code of `bits_per_code` bits in each of `books` codebooks; with the scale s of its row

    w[r, v dim + k] = s[r] sum_m codebooks[m, code(r, v, m), k]

    codebook2x8·d8   two codebooks of 2^8 vectors of 8 weights: 2 bits a weight
    codebook1x6·d2   one codebook of 2^6 pairs: 3 bits a weight

The codes of a row are one bit stream, vector after vector, in each the codes of all codebooks. The
codebooks hold float16 values and belong to the matrix: they are counted as part of it, which is
dear for small ones (1x16·d8 stores 8 Mbit).

Sources: AQLM (Egiazarian et al. 2024, arXiv 2401.06118), section 3, for additive codebooks;
Q-Palette (arXiv 2509.20214) for pairs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from qc.ir.weights.expression import Const, Expr, Load, total
from qc.ir.weights.notation import refuse_rest
from qc.ir.weights.packing import code_at, pack_codes, row_bytes, unpack_codes
from qc.ir.weights.weight import ArraySpec, Term, TermFormat

MOST_BOOKS = 8

TRAINED_ON = 1 << 15
"""Vectors that k-means sees at least; on Gaussian 2x8·d8 twice as many gain 1%."""

SAMPLES_PER_ENTRY = 4
"""... and for each entry of a larger codebook."""

ROUNDS_PER_SPLIT, ROUNDS_AT_LAST = 2, 8
"""Lloyd rounds after each doubling of a codebook, and after the last one."""

SWEEPS = 2
"""Sweeps over all codebooks on all vectors, after k-means on some: two gain 2%, a third 0.4%."""

DISTANCES_AT_ONCE = 1 << 20
"""Distances that are computed together: 4 MiB, that the caches hold and threads share well."""


@dataclass(frozen=True)
class CodebookFormat(TermFormat):
    """`books` codebooks of 2^bits_per_code vectors of `dim` weights; a float16 scale a row."""

    books: int
    bits_per_code: int
    dim: int = 8

    examples: ClassVar[tuple[str, ...]] = (
        "codebook1x8·d8", "codebook2x8·d8", "codebook1x12·d8", "codebook1x6·d2", "codebook3x5·d4",
        "codebook1x4·d1",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 1 <= self.bits_per_code <= 16:
            raise ValueError(f"codes have 1 to 16 bits, not {self.bits_per_code}")
        if not 1 <= self.books <= MOST_BOOKS:
            raise ValueError(f"1 to {MOST_BOOKS} codebooks are added, not {self.books}")
        if self.dim < 1:
            raise ValueError(f"a vector holds at least one weight, not {self.dim}")

    @property
    def entries(self) -> int:
        """The vectors of one codebook."""
        return 1 << self.bits_per_code

    def vectors(self, cols: int) -> int:
        """Return the vectors of a row, the shorter last one included."""
        return -(-cols // self.dim)

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        width = row_bytes(self.vectors(shape[1]) * self.books, self.bits_per_code)
        return {
            "codes": ArraySpec((shape[0], width), torch.uint8),
            "codebooks": ArraySpec((self.books, self.entries, self.dim), torch.float16),
            "scale": ArraySpec((shape[0],), torch.float16),
        }

    def decode(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        vector, place = col // self.dim, Const(0) if self.dim == 1 else col % self.dim
        parts: list[Expr] = []
        for book in range(self.books):
            code = code_at("codes", (row,), vector * self.books + book, self.bits_per_code)
            parts.append(Load("codebooks", (Const(book), code, place)))
        return total(parts) * Load("scale", (row,))

    def codes(self, shape: tuple[int, ...], packed: Tensor) -> Tensor:
        """Unpack the codes: [rows, vectors, books]."""
        number = self.vectors(shape[1]) * self.books
        codes: Tensor = unpack_codes(packed, self.bits_per_code, number)
        return codes.reshape(shape[0], -1, self.books)

    def dense(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Tensor:
        codes = self.codes(shape, arrays["codes"]).long()
        added = sum_of_entries(arrays["codebooks"].float(), codes.flatten(0, 1))
        rows = added.reshape(shape[0], -1)[:, : shape[1]]
        return rows * arrays["scale"].float().unsqueeze(1)

    def rows(self, term: Term, index: Tensor) -> Term:
        kept = {name: term.stored[name][index] for name in ("codes", "scale")}
        kept["codebooks"] = term.stored["codebooks"]
        return self.term((len(index), term.shape[1]), kept)

    def nearest(self, values: Tensor) -> Term:
        """Fit codebooks to the vectors of all rows, each row divided by its root mean square.

        Residual k-means on a fixed sample, then sweeps over all vectors: in each codebook the
        nearest entry to what the others leave, and each entry the mean of what chose it. Codes are
        chosen last, with the codebooks as they are stored. Minimises the squared error (a local
        minimum). Source: AQLM, section 3.1, for the start; without its beams.
        """
        rows, cols = values.shape
        values = values.float()
        scale = values.square().mean(1).sqrt().half()
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).float().unsqueeze(1)
        fill = (0, -cols % self.dim)
        vectors = torch.nn.functional.pad(values / divisor, fill).reshape(-1, self.dim)
        importance = scale.float().square().unsqueeze(1).expand(rows, cols)
        importance = torch.nn.functional.pad(importance, fill)  # none for what is filled up
        importance = importance.reshape(-1, self.dim)
        books = fit_codebooks(vectors, importance, self.books, self.entries).half()
        codes = choose_codes(vectors, importance, books.float())
        return codebook_term(self, (rows, cols), codes.unflatten(0, (rows, -1)), books, scale)

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self | None:
        head = re.fullmatch(r"codebook(\d+)x(\d+)", words[0])
        if head is None:
            return None
        sizes = [found for word in words[1:] if (found := re.fullmatch(r"d(\d+)", word))]
        refuse_rest([word for word in words[1:] if not re.fullmatch(r"d\d+", word)], "d8 (a size)")
        if len(sizes) > 1:
            raise ValueError("a vector has one size")
        dim = int(sizes[0][1]) if sizes else 8
        return cls(int(head[1]), int(head[2]), dim)

    def __str__(self) -> str:
        return f"codebook{self.books}x{self.bits_per_code}·d{self.dim}"


def codebook_term(
    format: CodebookFormat, shape: tuple[int, int], codes: Tensor, books: Tensor, scale: Tensor
) -> Term:
    """Store codes [rows, vectors, books], codebooks [books, entries, dim] and scales [rows]."""
    stored = {
        "codes": pack_codes(codes.flatten(1), format.bits_per_code),
        "codebooks": books.half(),
        "scale": scale.half(),
    }
    return format.term(shape, stored)


# ---------------------------------------------------------------- the fit
# vectors, importance [vectors, dim]: all minimise sum importance (vector - sum of entries)^2


def fit_codebooks(vectors: Tensor, importance: Tensor, books: int, entries: int) -> Tensor:
    """Return codebooks [books, entries, dim]: residual k-means on a sample, then sweeps on all."""
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))
    sample = order[: max(TRAINED_ON, SAMPLES_PER_ENTRY * entries)]
    left, weight = vectors[sample], importance[sample]
    found = torch.zeros(books, entries, vectors.shape[1])
    for book in found:
        book[:] = k_means(left, weight, entries)
        left = left - book[nearest_entry(left, weight, book)]
    codes = choose_codes(vectors, importance, found)
    for _ in range(SWEEPS):
        sweep(vectors, importance, found, codes)
    return found


def sweep(vectors: Tensor, importance: Tensor, books: Tensor, codes: Tensor) -> None:
    """Improve codes [vectors, books] and codebooks in place, one codebook after the other.

    The error never rises: each step is the best choice with everything else fixed.
    """
    left = vectors - sum_of_entries(books, codes)
    for number, book in enumerate(books):
        left += book[codes[:, number]]
        codes[:, number] = nearest_entry(left, importance, book)
        book[:] = entry_means(left, importance, codes[:, number], book)
        left -= book[codes[:, number]]


def choose_codes(vectors: Tensor, importance: Tensor, books: Tensor) -> Tensor:
    """Return codes [vectors, books]: each codebook takes what those before leave; then a sweep of
    new choices, each with the others fixed."""
    left = vectors
    codes = torch.zeros(len(vectors), len(books), dtype=torch.long)
    for number, book in enumerate(books):
        codes[:, number] = nearest_entry(left, importance, book)
        left = left - book[codes[:, number]]
    if len(books) > 1:
        for number, book in enumerate(books):
            left = left + book[codes[:, number]]
            codes[:, number] = nearest_entry(left, importance, book)
            left = left - book[codes[:, number]]
    return codes


def k_means(vectors: Tensor, importance: Tensor, entries: int) -> Tensor:
    """Return `entries` vectors: start with the mean, double by splitting, Lloyd rounds after each.

    An entry splits along the coordinate in which its vectors differ most. Few vectors are their own
    codebook, filled up with zeros.
    """
    book = torch.zeros(1, vectors.shape[1])
    if len(vectors) <= entries:
        return torch.cat([vectors, book.expand(entries - len(vectors), -1)])
    code = torch.zeros(len(vectors), dtype=torch.long)
    book = entry_means(vectors, importance, code, book)
    while len(book) < entries:
        spread = entry_means((vectors - book[code]).square(), importance, code, book * 0)
        axis = spread.argmax(1, keepdim=True)
        step = torch.zeros_like(book).scatter_(1, axis, spread.gather(1, axis).sqrt())
        book = torch.stack([book - step, book + step], 1).flatten(0, 1)
        for _ in range(ROUNDS_PER_SPLIT if len(book) < entries else ROUNDS_AT_LAST):
            code = nearest_entry(vectors, importance, book)
            book = entry_means(vectors, importance, code, book)
    return book


def nearest_entry(vectors: Tensor, importance: Tensor, book: Tensor) -> Tensor:
    """Return the number of the nearest entry: i64[vectors]."""
    by_vector = torch.cat([importance * vectors, importance], 1)
    by_entry = torch.cat([-2 * book, book.square()], 1).T.contiguous()
    at_once = max(1, DISTANCES_AT_ONCE // len(book))
    chosen = torch.empty(len(vectors), dtype=torch.long)
    distances = torch.empty(min(at_once, len(vectors)), len(book))
    for start in range(0, len(vectors), at_once):
        some = by_vector[start : start + at_once]
        torch.mm(some, by_entry, out=distances[: len(some)])
        # numpy's argmin is vectorised along a row, torch's is not: four times the speed
        numbers = distances[: len(some)].numpy().argmin(1)
        chosen[start : start + at_once] = torch.from_numpy(numbers)
    return chosen


def entry_means(vectors: Tensor, importance: Tensor, code: Tensor, before: Tensor) -> Tensor:
    """Return the weighted mean of the vectors of each entry; those before where it has none."""
    at = code.unsqueeze(1).expand_as(vectors)
    weight = torch.zeros_like(before).scatter_add_(0, at, importance)
    weighted = torch.zeros_like(before).scatter_add_(0, at, importance * vectors)
    return torch.where(weight > 0, weighted / weight, before)


def sum_of_entries(books: Tensor, codes: Tensor) -> Tensor:
    """Add the entries that codes [vectors, books] name: f32[vectors, dim]."""
    added = torch.zeros(len(codes), books.shape[2])
    for number, book in enumerate(books):
        added += book[codes[:, number]]
    return added
