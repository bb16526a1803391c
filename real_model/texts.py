"""Cut the calibration and the evaluation text out of the encyclopedia summaries."""

import json
from pathlib import Path

CALIBRATION_ITEMS = slice(0, 1000)
EVALUATION_ITEMS = slice(5000, 7000)


def read_extracts(file: Path) -> list[str]:
    """Return each item's plain text, in file order."""
    items = json.loads(file.read_text(encoding="utf-8"))
    return [item["extract"] for item in items.values()]


def write_text(extracts: list[str], file: Path) -> None:
    """Join by one blank line; the file is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text("\n\n".join(extracts), encoding="utf-8")
    unfinished.replace(file)
