"""Results as a table for the README and as a picture."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers import plot_python

Results = Mapping[str, Any]


def markdown(results: Results) -> str:
    """Return the figures as a table, a column a contender."""
    names = contenders_of(results)
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for label, row, form in rows_of(results):
        cells = [form(row[name]) if name in row else "" for name in names]
        if any(cells):
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *notes_of(results)]) + "\n"


def contenders_of(results: Results) -> list[str]:
    """Return every contender that has a figure."""
    found: dict[str, None] = {}
    for _, row, _ in rows_of(results):
        found |= dict.fromkeys(row)
    return list(found)


Row = tuple[str, Mapping[str, float], Callable[[float], str]]


def rows_of(results: Results) -> list[Row]:
    """Return every line of the table that was measured."""

    def two(value: float) -> str:
        return f"{value:.2f}"

    def whole(value: float) -> str:
        return f"{value:,.0f}"

    def megabytes(value: float) -> str:
        return f"{value / 1e6:.1f}"

    def at(*path: str) -> Mapping[str, float]:
        found: Any = results
        for key in path:
            found = found.get(key, {})
        return dict(found)

    better = "times better, median of the pairs"
    return [
        ("stored, MB", at("size", "stored_bytes"), megabytes),
        ("perplexity", at("accuracy", "perplexity"), two),
        ("ms a token, 128 greedy tokens, all in", at("decode", "median"), two),
        (better, at("decode", "times_better_than"), two),
        ("ms a token at 2,000 tokens of context", at("context", "median"), two),
        (better, at("context", "times_better_than"), two),
        ("tokens/s, prompt of 512", at("prefill", "median"), whole),
        (better, at("prefill", "times_better_than"), two),
        ("tokens/s, batch of 8", at("batch", "after", "median"), whole),
        ("batch of 8 over batch of 1", at("batch", "ratio"), two),
        ("ms a token, one thread", at("threads", "after", "median"), two),
        ("one thread over all", at("threads", "ratio"), two),
        ("ms a token beside two busy processes", at("busy", "after", "median"), two),
        ("busy over quiet", at("busy", "ratio"), two),
        ("s from process to ready", at("load", "ready", "median"), two),
        ("s from process to first token", at("load", "first_token"), two),
        ("peak memory, MB, 128 tokens", at("load", "peak_bytes"), megabytes),
        ("peak memory, MB, prompt of 2,000", at("load", "peak_bytes_long_prompt"), megabytes),
        ("s to convert", at("compile", "peers_convert_seconds"), two),
    ]


def notes_of(results: Results) -> list[str]:
    """Return what does not fit a column: floors, the compiler, who was left out."""
    notes = []
    rate = results.get("machine", {}).get("read_bytes_a_second")
    read = results.get("size", {}).get("linear_bytes")
    if rate:
        facts = results["machine"]
        notes.append(f"{facts['cpu']}, {facts['threads']} threads, reads {rate / 1e9:.1f} GB/s.")
    if rate and read:
        notes.append(
            f"Floor of a token: {read / 1e6:.1f} MB of linears are {1e3 * read / rate:.2f} ms of "
            "memory bandwidth."
        )
    compiled = results.get("compile")
    if compiled:
        notes.append(
            f"Compiling takes {min(compiled['seconds']):.1f} s and "
            f"{compiled['peak_bytes'] / 1e6:,.0f} MB at most (the model has "
            f"{compiled['model_bytes'] / 1e6:,.0f} MB)."
        )
    for name, reason in results.get("left_out", {}).items():
        notes.append(f"{name} is left out: {reason}")
    return notes


def draw(results_file: Path, picture: Path) -> None:
    """Draw the speeds, in an environment that has matplotlib."""
    script = Path(__file__).with_name("workers") / "draw_chart.py"
    try:
        subprocess.run([plot_python(), script, results_file, picture], check=True)
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"no picture: {error}")
