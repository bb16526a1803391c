"""An explanation as tables in a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from qc.runtime.explanation import Explanation


def show(explanation: Explanation, console: Console | None = None, limit: int | None = 30) -> None:
    """Print the worst `limit` layers (None: all), the passes, and what was measured."""
    screen = console or Console()
    shown = explanation.layers[:limit]
    rows = explanation.rows()[:limit]
    screen.print(table_of(rows, "layers, the worst first"))
    if len(shown) < len(explanation.layers):
        screen.print(f"... and {len(explanation.layers) - len(shown)} layers that lose less")
    screen.print(table_of(explanation.by_pass(), "passes, the mean of the layers they changed"))
    screen.print(explanation.headline(), highlight=False)


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    """Return rows as a table, numbers to the right."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for name, value in (rows[0] if rows else {}).items():
        table.add_column(name, justify="right" if isinstance(value, int | float) else "left")
    for row in rows:
        table.add_row(*(text_of(value) for value in row.values()))
    return table


def text_of(value: Any) -> str:
    """Print one cell."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
