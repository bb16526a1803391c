"""Show what was compiled and where time goes, as data and as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CheckedKernel", "KernelTime", "Profile", "Report", "Verification", "format_table"]


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Align rows under the names of their fields; numbers to the right."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return "(nothing)"
    cells = [[_format_cell(row.get(column)) for column in columns] for row in rows]
    widths = [
        max(len(column), *(len(line[at]) for line in cells)) for at, column in enumerate(columns)
    ]
    numeric = [
        all(isinstance(row.get(column), int | float | None) for row in rows) for column in columns
    ]

    def line(texts: Iterable[str]) -> str:
        return "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, numeric, strict=True)
        ).rstrip()

    return "\n".join([line(columns), line("-" * width for width in widths), *map(line, cells)])


def _format_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


@dataclass(frozen=True)
class Report:
    """Hold what the compiler wrote down: rows about layers, and a summary. str() is a table."""

    content: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.content)

    def __str__(self) -> str:
        rows = self.content.get("rows", [])
        parts = []
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            parts.append(format_table(rows))
        summary = self.content.get("summary", {})
        if isinstance(summary, dict) and summary:
            width = max(map(len, summary))
            parts.append(
                "\n".join(f"{key.ljust(width)}  {_format_cell(v)}" for key, v in summary.items())
            )
        stayed = self.content.get("on_torch")
        if isinstance(stayed, list):
            parts.append(_describe_torch(stayed))
        return "\n\n".join(parts) or "(this artifact has no report)"


def _describe_torch(stayed: Sequence[Mapping[str, Any]]) -> str:
    """List the operations that no kernel does, each with the places where it occurs."""
    places: dict[str, list[str]] = {}
    for each in stayed:
        places.setdefault(str(each.get("op")), []).append(str(each.get("origin") or "the model"))
    lines = [f"  {op} at {', '.join(dict.fromkeys(at))}" for op, at in places.items()]
    return "\n".join(["stayed on torch:", *lines]) if lines else "nothing stayed on torch"


@dataclass(frozen=True, slots=True)
class KernelTime:
    """Count one kernel in one phase: calls, and milliseconds of all of them, in one run."""

    phase: str
    kernel: str
    calls: int
    milliseconds: float


@dataclass(frozen=True)
class Profile:
    """Hold the time of every kernel, the costliest first within a phase. str() is a table."""

    rows: tuple[KernelTime, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows]}

    def total(self, phase: str) -> float:
        """Return the milliseconds of one run of a phase."""
        return sum(row.milliseconds for row in self.rows if row.phase == phase)

    def __str__(self) -> str:
        return format_table(
            [
                asdict(row) | {"share %": 100 * row.milliseconds / (self.total(row.phase) or 1)}
                for row in self.rows
            ]
        )


@dataclass(frozen=True, slots=True)
class CheckedKernel:
    """Compare what launches computed with what they must: the error is relative to the norm."""

    kernel: str
    sizes: str
    error: float
    tolerance: float
    origin: str

    @property
    def is_right(self) -> bool:
        return self.error <= self.tolerance  # False for NaN, too


@dataclass(frozen=True)
class Verification:
    """Hold what became of every golden check. str() names the wrong ones, or says that all are
    right."""

    device: str
    rows: tuple[CheckedKernel, ...]

    @property
    def wrong(self) -> tuple[CheckedKernel, ...]:
        return tuple(row for row in self.rows if not row.is_right)

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "rows": [asdict(row) | {"right": row.is_right} for row in self.rows],
        }

    def __str__(self) -> str:
        if not self.wrong:
            worst = max((row.error for row in self.rows), default=0.0)
            return (
                f"{self.device}: all {len(self.rows)} checks are right; the largest relative "
                f"error is {worst:.1e}"
            )
        lines = [
            f"wrong: {row.kernel} ({row.sizes}), at {row.origin or 'the model'}: relative error "
            f"{row.error:.1e}, at most {row.tolerance:.1e} is right"
            for row in self.wrong
        ]
        return "\n".join([*lines, f"{self.device}: {len(lines)} of {len(self.rows)} are wrong"])
