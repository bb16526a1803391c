"""Search compositions of passes for the least perplexity at so many stored bits.

    python -m benchmarks.search_compositions build/smollm2-135m-offgrid --most-bits 3.5

Candidates are transforms x decompositions x quantizers x formats, of which those stay whose linears
take at most `--most-bits` a weight, everything included. They compete in rounds, each with more
data for fewer of them (successive halving, Jamieson and Talwalkar 2016). The text that decides is
what follows the calibration windows in the calibration text: the evaluation text of
benchmarks.accuracy is looked at once, by whoever reports a figure.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.accuracy import (
    WINDOW,
    evaluation_windows,
    perplexity_of,
    remembered,
    stored_bits,
)
from qc.compiler import trace
from qc.passes.calibration import Calibration
from qc.passes.decompose.low_rank import SplitLowRank
from qc.passes.decompose.outliers import SplitOutliers
from qc.passes.pipeline import Pass, Pipeline
from qc.passes.preview import preview
from qc.passes.quantize.gptq import Gptq
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.transform.awq import AwqScales
from qc.passes.transform.clip_weights import ClipWeights
from qc.passes.transform.fold_scales import FoldScales
from qc.passes.transform.rotate_heads import RotateHeads
from qc.passes.transform.rotate_inputs import RotateInputs
from qc.passes.transform.rotate_stream import RotateStream
from qc.stages import CanonicalModel
from real_model import BUILD, CALIBRATION

CALIBRATION_WINDOWS = 128
"""The windows that are never used to decide."""

ROUNDS = ((16, 8), (32, 16), (128, 48))
"""Calibration windows and deciding windows of each round; a third of the candidates goes on."""

ROTATED = (RotateStream(), RotateHeads())

FORMATS = {
    2: (
        "int2·g64·min",
        "int2·g64·min·scale(uint6·row)·minimum(uint6·row)",
        "int2·g32·min·scale(uint6·row)·minimum(uint6·row)",
    ),
    3: (
        "int3·g64·min",
        "int3·g64·zero",
        "int3·g64·min·scale(uint6·row)·minimum(uint6·row)",
        "int3·g32·min·scale(uint6·row)·minimum(uint6·row)",
    ),
    4: (
        "int4·g64·min",
        "int4·g64·zero",
        "int4·g64·min·scale(uint6·row)·minimum(uint6·row)",
        "int4·g32·min·scale(uint6·row)·minimum(uint6·row)",
    ),
}


@dataclass(frozen=True)
class Candidate:
    """A composition and what it takes."""

    passes: tuple[Pass, ...]
    bits: float

    def __str__(self) -> str:
        return f"{self.bits:.2f} bits: {', '.join(map(repr, self.passes))}"


def transforms(format: str) -> Iterator[tuple[Pass, ...]]:
    """Yield what may stand in front of quantization."""
    scaled = (AwqScales(format), FoldScales())
    yield ()
    yield scaled
    yield ROTATED
    yield (*ROTATED, RotateInputs("down_proj"))
    yield (*ROTATED, *scaled)


def decompositions() -> Iterator[tuple[Pass, ...]]:
    """Yield what may be taken out of weights."""
    yield ()
    yield (SplitOutliers("hessian", "0.5%"),)
    yield (SplitLowRank("rank4", whiten=True),)


def quantizers(format: str) -> Iterator[tuple[Pass, ...]]:
    """Yield ways to find the stored values."""
    yield (ClipWeights(format), RoundToNearest(format, heads=False))
    yield (Gptq(format, ranges="mse", refinements=3),)
    yield (Gptq(format, ranges="mse", refinements=3, repair=0.5),)


def candidates(model: CanonicalModel, bits: int, most: float) -> list[Candidate]:
    """Return every composition that stores the linears of the blocks in at most `most` bits."""
    found = []
    for format in FORMATS[bits]:
        parts = (transforms(format), decompositions(), quantizers(format))
        for chosen in itertools.product(*map(tuple, parts)):
            in_front, taken_out, quantized = chosen
            seen = preview(Pipeline((*taken_out, *quantized)), model.graph).graph
            assert seen is not None, f"{quantized} need values to say what they store"
            stored = stored_bits(seen)["blocks"]
            if stored <= most:
                found.append(Candidate((*in_front, *taken_out, *quantized), stored))
    return found


def decide(model: CanonicalModel, one: Candidate, samples: int, windows: int) -> dict[str, Any]:
    """Quantize on the first `samples` windows and evaluate on text behind all of them."""
    data = Calibration(Path(CALIBRATION), samples, WINDOW)
    quantized = model.quantize(Pipeline(one.passes), calibration=data)
    text = evaluation_windows(model, Path(CALIBRATION), CALIBRATION_WINDOWS + windows)
    deciding = text[CALIBRATION_WINDOWS:]
    return {"perplexity": round(perplexity_of(quantized.graph, deciding), 4), "bits": one.bits}


def search(
    model: CanonicalModel, found: Sequence[Candidate], results: Path
) -> list[tuple[float, Candidate]]:
    """Let candidates compete; return those of the last round, the best first."""
    ranked: list[tuple[float, Candidate]] = [(0.0, each) for each in found]
    for number, (samples, windows) in enumerate(ROUNDS):
        if number:
            ranked = ranked[: max(2, -(-len(ranked) // 3))]
        scores = []
        for _, one in ranked:
            facts = {"composition": str(one), "samples": samples, "windows": windows}
            compute = partial(decide, model, one, samples, windows)
            score = remembered(results, facts, compute)
            print(json.dumps(score, ensure_ascii=False), flush=True)
            scores.append((score["perplexity"], one))
        ranked = sorted(scores, key=lambda each: each[0])
    return ranked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, default=3, choices=FORMATS, help="of a code")
    parser.add_argument("--most-bits", type=float, default=3.5, help="stored a weight")
    parser.add_argument("--list", action="store_true", help="only name the candidates")
    parser.add_argument("--results", default=str(BUILD / "compositions"))
    options = parser.parse_args()
    model = trace(options.model).canonicalize()
    found = candidates(model, options.bits, options.most_bits)
    if options.list:
        print("\n".join(map(str, found)))
        return
    for perplexity, one in search(model, found, Path(options.results)):
        print(f"{perplexity:.3f}  {one}")


if __name__ == "__main__":
    main()
