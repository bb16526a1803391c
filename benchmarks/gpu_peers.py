"""What GPU linears are compared with, and the picture of the comparison."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_linear import (
    CACHED,
    MOST_COPIES,
    dense_seconds,
    int4_seconds,
    time_torch,
)

GROUP = 128


def rows(outer: int, inner: int, count: int) -> Iterator[tuple[str, float]]:
    """Yield the microseconds that others take for a product of this size."""
    yield "torch float16", dense_seconds(outer, inner, count, torch.float16) * 1e6
    yield "torch bfloat16", dense_seconds(outer, inner, count, torch.bfloat16) * 1e6
    for name, found in (
        ("torch int4·g128", int4_seconds(outer, inner, count, GROUP)),
        ("gemlite int4·g128", gemlite_seconds(outer, inner, count)),
    ):
        if found is not None:
            yield name, found * 1e6


def gemlite_seconds(outer: int, inner: int, count: int) -> float | None:
    """Return the seconds of gemlite's int4 product; None where it is not installed, or has none of
    this size."""
    if importlib.util.find_spec("gemlite") is None or inner % GROUP or outer % 128:
        return None
    from gemlite.core import DType, GemLiteLinear  # type: ignore[import-not-found]

    copies = min(MOST_COPIES, max(2, -(-CACHED // (outer * inner // 2))))
    layers = []
    for _ in range(copies):
        layer = GemLiteLinear(
            4, group_size=GROUP, in_features=inner, out_features=outer,
            input_dtype=DType.FP16, output_dtype=DType.FP16,
        )  # fmt: skip
        codes = torch.randint(0, 16, (outer, inner), dtype=torch.uint8, device="cuda")
        scales = torch.randn(outer * inner // GROUP, 1, device="cuda").half() / 8
        layer.pack(codes, scales, torch.full_like(scales, 8.0), None)
        layers.append(layer)
    x = torch.randn(count, inner, device="cuda").half()
    return time_torch(lambda layer: layer(x), layers)


SHOWN = (
    (4096, 4096), (14336, 4096), (4096, 14336),
)  # fmt: skip


def draw(content: dict[str, Any], picture: Path) -> None:
    """Draw speed over float16 against the number of rows, a chart a shape."""
    measured = content.get("linears", ())
    if not measured or importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib  # type: ignore[import-not-found]

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SHOWN), figsize=(5 * len(SHOWN), 4), sharey=True)
    for axis, (outer, inner) in zip(axes, SHOWN, strict=True):
        here = [r for r in measured if (r["outer"], r["inner"]) == (outer, inner)]
        for label in dict.fromkeys(r["label"] for r in here):
            line = [(r["rows"], r["over_float16"]) for r in here if r["label"] == label]
            axis.plot(*zip(*line, strict=True), marker="o", label=f"qc {label}")
        peers = dict.fromkeys(name for r in here for name in r["peers"])
        for name in [each for each in peers if each != "torch float16"]:
            line = [
                (r["rows"], r["peers"]["torch float16"] / r["peers"][name])
                for r in here
                if name in r["peers"] and r["label"] == here[0]["label"]
            ]
            axis.plot(*zip(*line, strict=True), "--", color="#9aa0a6", label=name)
        axis.axhline(1, color="black", linewidth=0.6)
        axis.set(title=f"{outer} x {inner}", xscale="log", xlabel="rows")
    axes[0].set_ylabel("times as fast as torch float16")
    axes[-1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(picture, dpi=130)
