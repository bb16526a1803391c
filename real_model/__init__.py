"""The model and the text that the demo, the slow tests and the benchmarks measure on.

`python -m real_model` writes both under `build/`; nothing of it belongs to the package `qc`.
The model is SmolLM2-135M-Instruct. The one copy that a package carries is stored in 4 bits, exactly
on a grid, which flatters every 4-bit method; `turn.py` moves the weights off that grid without
changing the function, and that is the model measured on.
"""

from pathlib import Path

BUILD = Path(__file__).resolve().parent.parent / "build"

DATA = BUILD / "data"
"""Where the packages of packages.txt are unpacked."""

MODEL = BUILD / "smollm2-135m-offgrid"
"""A Hugging Face folder, float32, embedding and head apart."""

CALIBRATION = BUILD / "text" / "calibration.txt"
EVALUATION = BUILD / "text" / "evaluation.txt"
