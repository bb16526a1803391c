"""What `qc check` answers: rows about linears, totals, refusals; as data and as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qc.checking.cost import CompileCost
from qc.errors import FormatError
from qc.passes.pipeline import Refusal
from qc.runtime.tables import format_table

NAMES_SHOWN = 3


@dataclass(frozen=True)
class CheckedLinear:
    """Linears of one shape, format and kernel: `count` of them, together `bytes` stored.

    `speedups` are over 16-bit weights, by rows of x; empty where no speed is predicted. From
    `flat_from` rows on nothing is gained.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    format: str
    activation: str
    kernel: tuple[str, ...]
    bytes: int
    bytes_a_token: int
    bits_a_weight: float
    speedups: dict[int, float] = field(default_factory=dict)
    flat_from: int | None = None

    @property
    def count(self) -> int:
        return len(self.names)

    def to_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "count": self.count,
            "shape": list(self.shape),
            "format": self.format,
            "activation": self.activation,
            "kernel": list(self.kernel),
            "bytes": self.bytes,
            "bytes_per_token": self.bytes_a_token,
            "bits_per_weight": round(self.bits_a_weight, 4),
            "speedup": {str(rows): round(value, 2) for rows, value in self.speedups.items()},
            "no_speedup_from_rows": self.flat_from,
        }

    @property
    def remark(self) -> str:
        """Say where nothing is gained."""
        if not self.speedups:
            return "no speed-up"
        if self.flat_from is None:
            return ""
        return "no speed-up" if self.flat_from == 1 else f"none from {self.flat_from} rows on"


@dataclass(frozen=True)
class CheckReport:
    """Every linear as it will be compiled, or why something cannot be."""

    source: str
    target: str
    cores: int
    rows: tuple[CheckedLinear, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    speedups: dict[int, float] = field(default_factory=dict)
    cost: CompileCost | None = None
    notes: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        return not self.refusals

    def require_accepted(self) -> None:
        """Raise FormatError with the first refusal where there is one."""
        require_none(self.refusals)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        cost = None
        if self.cost is not None:
            cost = {
                "quantize_seconds": round(self.cost.quantize, 1),
                "kernel_seconds": round(self.cost.kernels, 1),
                "write_seconds": round(self.cost.write, 1),
                "memory_bytes": self.cost.memory,
            }
        return {
            "source": self.source,
            "target": self.target,
            "cores": self.cores,
            "accepted": self.accepted,
            "rows": [row.to_dict() for row in self.rows],
            "refusals": [
                {
                    "weight": each.weight,
                    "shape": list(each.shape),
                    "format": each.format,
                    "reason": each.reason,
                    "instead": each.instead,
                }
                for each in self.refusals
            ],
            "summary": self.summary,
            "compile": cost,
            "notes": list(self.notes),
        }

    @property
    def summary(self) -> dict[str, Any]:
        """The totals over all linears."""
        stored = sum(row.bytes for row in self.rows)
        weights = sum(row.count * row.shape[0] * row.shape[1] for row in self.rows)
        return {
            "linears": sum(row.count for row in self.rows),
            "bytes": stored,
            "bytes_per_token": sum(row.bytes_a_token for row in self.rows),
            "bits_per_weight": round(8 * stored / weights, 4) if weights else 0.0,
            "speedup": {str(rows): round(value, 2) for rows, value in self.speedups.items()},
        }

    def __str__(self) -> str:
        if self.refusals:
            return refusals_text(self.refusals)
        table = format_table([line_of(row) for row in self.rows]) if self.rows else "no linears"
        return "\n".join([table, "", *self.total_lines(), *self.notes])

    def total_lines(self) -> list[str]:
        """Print the totals."""
        total = self.summary
        lines = [
            f"{total['linears']} linears: {total['bytes']:,} bytes, "
            f"{total['bits_per_weight']:.2f} bits a weight, "
            f"{total['bytes_per_token']:,} bytes read for each token"
        ]
        if self.speedups:
            found = ", ".join(f"{value:.1f} for {rows}" for rows, value in self.speedups.items())
            lines.append(
                f"speed-up over 16-bit weights by rows of x, predicted from nominal facts of "
                f"{self.target}: {found}"
            )
        if self.cost is not None:
            lines.append(
                f"compiling will take about {self.cost.seconds:.0f} s after the capture "
                f"(quantize {self.cost.quantize:.0f}, kernels {self.cost.kernels:.0f}, "
                f"write {self.cost.write:.0f}) and {self.cost.memory / 1e9:.1f} GB of memory"
            )
        return lines


def line_of(row: CheckedLinear) -> dict[str, Any]:
    """Return a row of the table."""
    stored = row.format if row.activation == "float32" else f"{row.format}, {row.activation}"
    line: dict[str, Any] = {
        "n": row.count,
        "weight": folded_names(row.names),
        "shape": "x".join(map(str, row.shape)),
        "stored, read": stored,
        "kernel": " + ".join(row.kernel),
        "bits": f"{row.bits_a_weight:.2f}",
        "bytes": row.bytes,
        "bytes/token": row.bytes_a_token,
    }
    for rows, value in row.speedups.items():
        line["1 row" if rows == 1 else f"{rows} rows"] = f"{value:.1f}"
    return line | {"speed-up": row.remark}


def folded_names(names: Sequence[str]) -> str:
    """Name many weights: numbers become *, and of several patterns the ends are listed."""
    patterns = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    if len(names) == 1:
        return names[0]
    shown = [patterns[0], *(f"...{'.'.join(p.split('.')[-2:])}" for p in patterns[1:NAMES_SHOWN])]
    rest = len(patterns) - len(shown)
    return ", ".join(shown) + (f", {rest} more" if rest > 0 else "")


def refusals_text(refusals: Sequence[Refusal]) -> str:
    """Print every refusal once for all weights of a shape."""
    alike: dict[tuple[object, ...], list[Refusal]] = {}
    for each in refusals:
        alike.setdefault((each.shape, each.format, each.reason), []).append(each)
    lines = []
    for found in alike.values():
        more = f" (and {len(found) - 1} more of this shape)" if len(found) > 1 else ""
        lines.append(f"refused: {found[0]}{more}")
    return "\n".join(lines)


def require_none(refusals: Sequence[Refusal]) -> None:
    """Raise FormatError with the first refusal where there is one."""
    if refusals:
        more = f" ({len(refusals) - 1} more weights are refused)" if len(refusals) > 1 else ""
        raise FormatError(f"{refusals[0]}{more}")
