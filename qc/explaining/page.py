"""An explanation as one page of HTML: plots drawn in SVG, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from qc.runtime.explanation import Explanation, LayerFigures

STYLE = """
:root { color-scheme: light dark; --bar: #3b76b8; --worst: #c8503c; --grid: #8884; }
body { font: 14px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem .6rem; border-bottom: 1px solid var(--grid) }
td.number, th.number { text-align: right }
svg { width: 100%; height: auto; display: block }
svg text { font-size: 11px; fill: currentColor }
rect.bar { fill: var(--bar) } rect.worst { fill: var(--worst) }
line { stroke: var(--grid) }
"""

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 1000, 220, 64, 24, 10
"""The size of a plot and the room for its labels, in SVG units."""

WORST = 10
"""Layers drawn in another colour."""


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
    passes = explanation.by_pass()
    names = [str(row["pass"]) for row in passes]
    errors = bars([float(row["output error"]) for row in passes], names)
    sections.append(
        f"<h2>Output error by pass</h2>{errors}"
        f"<p>{escape(', then '.join(names))}: the mean over the layers that each pass changed.</p>"
    )
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    lines = "".join(f"<p>{escape(line)}</p>" for line in explanation.headline().splitlines())
    body = f"<h1>{title}</h1>{lines}{''.join(sections)}<h2>Layers, the worst first</h2>"
    table = html_table(explanation.rows())
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}{table}</body></html>\n'


def figure(
    title: str, unit: str, values: Sequence[float], layers: Sequence[LayerFigures], worst: set[str]
) -> str:
    """Return a plot of one value a layer under its title."""
    marked = [layer.name in worst for layer in layers]
    plot = bars(values, [layer.name for layer in layers], marked)
    return f"<h2>{escape(title)} ({escape(unit)})</h2>{plot}"


def bars(values: Sequence[float], names: Sequence[str], marked: Iterable[bool] = ()) -> str:
    """Return a bar chart as SVG; a bar says its name and value when it is pointed at."""
    top = max(values, default=0.0) or 1.0
    room, base = WIDTH - LEFT, HEIGHT - BOTTOM
    step = room / max(1, len(values))
    colours = [*marked] or [False] * len(values)
    drawn = [axis_line(share * top, base - share * (base - TOP)) for share in (0.0, 0.5, 1.0)]
    for number, (value, name, is_marked) in enumerate(zip(values, names, colours, strict=True)):
        height = max(0.5, value / top * (base - TOP))
        drawn.append(
            f'<rect class="{"worst" if is_marked else "bar"}" x="{LEFT + number * step:.2f}" '
            f'y="{base - height:.2f}" width="{min(step * 0.8, 60):.2f}" height="{height:.2f}">'
            f"<title>{escape(name)}: {value:.4g}</title></rect>"
        )
    label = f'<text x="{LEFT}" y="{HEIGHT - 6}">first to last</text>'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(drawn)}{label}</svg>'


def axis_line(value: float, y: float) -> str:
    """Return a line across a plot with its value at the left."""
    line = f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'


def html_table(rows: Sequence[dict[str, object]]) -> str:
    """Return rows as a table, numbers to the right."""
    if not rows:
        return "<p>No layer lost anything.</p>"

    def cell(value: object, tag: str = "td") -> str:
        if isinstance(value, float):
            return f'<{tag} class="number">{value:.4g}</{tag}>'
        return f"<{tag}>{escape('' if value is None else str(value))}</{tag}>"

    head = "".join(cell(name, "th") for name in rows[0])
    body = "".join(f"<tr>{''.join(map(cell, row.values()))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
