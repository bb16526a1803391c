"""An explanation as one page of HTML: plots drawn in SVG, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from qc.runtime.explanation import Explanation, LayerFigures

STYLE = """
:root { color-scheme: light dark; --bar: #3b76b8; --worst: #c8503c; --grid: #8884; }
body { font: 14px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem .6rem; border-bottom: 1px solid var(--grid) }
td.number, th.number { text-align: right }
td.number { white-space: nowrap }
.wide { overflow-x: auto }
svg { width: 100%; height: auto; display: block }
svg text { font-size: 11px; fill: currentColor }
rect.bar { fill: var(--bar) } rect.worst { fill: var(--worst) }
.worst { color: var(--worst) }
line { stroke: var(--grid) }
"""

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 1000, 220, 64, 24, 10
"""The size of a plot and the room for its labels, in SVG units."""

WORST = 10
"""Layers drawn in another colour."""

LEGEND = (
    '<p>A bar is a layer, in the order of the model; <span class="worst">the {} worst</span> have '
    "another colour. Point at a bar for its name and value.</p>"
)

ROW, NAMES = 28, 220
"""The height of a labelled bar, and the room for its name."""


def explanation_page(explanation: Explanation) -> str:
    """Return a whole HTML document."""
    layers = explanation.in_order()
    worst = {layer.name for layer in explanation.layers[:WORST]}
    title = escape(f"{explanation.recipe or 'quantization'} of {explanation.source or 'a model'}")
    measure = "output error" if explanation.divergence is None else "KL, nats a token"
    plots = (
        ("Sensitivity by layer", measure, [layer.loss for layer in layers]),
        ("Stored bits by layer", "bits a weight", [layer.bits for layer in layers]),
        ("Output error by layer", "relative", [layer.output_error for layer in layers]),
    )
    sections = [figure(*plot, layers, worst) for plot in plots]
    if layers:
        sections.insert(0, LEGEND.format(min(WORST, len(layers))))
        sections.append(
            "<h2>Output error by pass (relative)</h2>"
            f"{labelled_bars(explanation.by_pass())}"
            "<p>The mean over the layers that each pass changed.</p>"
        )
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    lines = "".join(f"<p>{escape(line)}</p>" for line in explanation.headline().splitlines())
    body = f"<h1>{title}</h1>{lines}{''.join(sections)}<h2>Layers, the worst first</h2>"
    table = html_table(rows_with_passes(explanation))
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}{table}</body></html>\n'


def figure(
    title: str, unit: str, values: Sequence[float], layers: Sequence[LayerFigures], worst: set[str]
) -> str:
    """Return a plot of one value a layer under its title."""
    marked = [layer.name in worst for layer in layers]
    plot = bars(values, [layer.name for layer in layers], marked)
    return f"<h2>{escape(title)} ({escape(unit)})</h2>{plot}"


def bars(values: Sequence[float], names: Sequence[str], marked: Sequence[bool]) -> str:
    """Return a bar chart as SVG; a bar says its name and value when it is pointed at."""
    top = max(values, default=0.0) or 1.0
    room, base = WIDTH - LEFT, HEIGHT - BOTTOM
    step = room / max(1, len(values))
    drawn = [axis_line(share * top, base - share * (base - TOP)) for share in (0.0, 0.5, 1.0)]
    for number, (value, name, is_marked) in enumerate(zip(values, names, marked, strict=True)):
        height = max(0.5, value / top * (base - TOP))
        drawn.append(
            f'<rect class="{"worst" if is_marked else "bar"}" x="{LEFT + number * step:.2f}" '
            f'y="{base - height:.2f}" width="{min(step * 0.8, 60):.2f}" height="{height:.2f}">'
            f"<title>{escape(name)}: {value:.4g}</title></rect>"
        )
    ends = [(LEFT, "start", "first layer"), (WIDTH, "end", "last")]
    drawn += [
        f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="{anchor}">{text}</text>'
        for x, anchor, text in ends
    ]
    return svg(HEIGHT, drawn)


def labelled_bars(passes: Sequence[dict[str, Any]]) -> str:
    """Return a bar for each pass, one below the other, with its name and its error."""
    top = max(row["output error"] for row in passes) or 1.0
    room = WIDTH - NAMES - LEFT
    drawn = []
    for number, row in enumerate(passes):
        error, y = row["output error"], number * ROW
        width, middle = max(0.5, error / top * room), y + ROW / 2 + 4
        drawn.append(
            f'<text x="{NAMES - 8}" y="{middle:.1f}" text-anchor="end">'
            f"{escape(row['pass'])} ({row['layers']})</text>"
            f'<rect class="bar" x="{NAMES}" y="{y + 4}" width="{width:.2f}" height="{ROW - 8}"/>'
            f'<text x="{NAMES + width + 6:.2f}" y="{middle:.1f}">{error:.4g}</text>'
        )
    return svg(len(passes) * ROW, drawn)


def svg(height: int, drawn: Iterable[str]) -> str:
    """Return a drawing as wide as the page."""
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(drawn)}</svg>'


def axis_line(value: float, y: float) -> str:
    """Return a line across a plot with its value at the left."""
    line = f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'


def rows_with_passes(explanation: Explanation) -> list[dict[str, Any]]:
    """Return one row a layer; where several passes lose something, with the output error behind
    each."""
    passes = [row["pass"] for row in explanation.by_pass()]
    if len(passes) < 2:
        return explanation.rows()
    found = []
    for layer, row in zip(explanation.layers, explanation.rows(), strict=True):
        errors = {step.name: step.output_error for step in layer.steps}
        wide: dict[str, Any] = {}
        for name, value in row.items():
            if name == "output error":
                wide |= {f"output error, {each}": errors.get(each) for each in passes}
            else:
                wide[name] = value
        found.append(wide)
    return found


def html_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a table, numbers to the right."""
    if not rows:
        return "<p>No layer lost anything.</p>"
    numbers = {name for row in rows for name, value in row.items() if isinstance(value, float)}

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f'<td class="number">{value:.4g}</td>'
        text = escape("" if value is None else str(value))
        return f"<td>{text.replace('·', '·<wbr>')}</td>"  # long formats break between their parts

    def title(name: str) -> str:
        side = ' class="number"' if name in numbers else ""
        return f"<th{side}>{escape(name)}</th>"

    head = "".join(map(title, rows[0]))
    body = "".join(f"<tr>{''.join(map(cell, row.values()))}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'
