"""Draw the results: draw_chart.py RESULTS.json PICTURE.png (in an environment with matplotlib)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib  # type: ignore[import-not-found]  # in the environment for drawing only

matplotlib.use("Agg")
from matplotlib import pyplot  # type: ignore[import-not-found]

CHARTS = (
    ("decode", "ms a token, short prompt", ("median",)),
    ("context", "ms a token, 2,000 tokens of context", ("median",)),
    ("prefill", "prompt of 512, tokens/s", ("median",)),
    ("batch", "8 sequences, tokens/s", ("after", "median")),
    ("busy", "ms a token beside two busy processes", ("after", "median")),
    ("load", "peak memory, MB", ("peak_bytes",)),
)


def main(results_file: str, picture: str) -> None:
    """Draw a bar a contender, a chart a figure."""
    results = json.loads(Path(results_file).read_text())
    shown = [(title, row) for part, title, path in CHARTS if (row := find(results, part, path))]
    if not shown:
        return
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4.6 * columns, 2.6 * lines))
    flat = [axes] if len(shown) == 1 else list(axes.flat)
    for axis, (title, row) in zip(flat, shown, strict=False):
        scale = 1e-6 if title.endswith("MB") else 1.0
        names = list(row)[::-1]
        values = [row[name] * scale for name in names]
        colors = ["#1f6feb" if name.startswith("qc") else "#b8bec6" for name in names]
        bars = axis.barh(names, values, color=colors)
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in flat[len(shown) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(picture, dpi=130)


def find(results: dict[str, Any], part: str, path: tuple[str, ...]) -> dict[str, float]:
    """Return one row of the results, empty where it was not measured."""
    found: Any = results.get(part, {})
    for key in path:
        found = found.get(key, {})
    return dict(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
