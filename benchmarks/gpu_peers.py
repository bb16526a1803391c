"""What GPU linears are compared with, and the picture of the comparison."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_linear import (
    CACHED,
    GOOD,
    MOST_COPIES,
    dense_seconds,
    int4_seconds,
    time_torch,
)

GROUP = 128


def rows(
    outer: int, inner: int, count: int, marlin: Path | None = None
) -> Iterator[tuple[str, float]]:  # fmt: skip
    """Yield the microseconds that others take for a product of this size; `marlin` is the library
    that marlin/launch.cu makes."""
    yield "torch float16", dense_seconds(outer, inner, count, torch.float16) * 1e6
    yield "torch bfloat16", dense_seconds(outer, inner, count, torch.bfloat16) * 1e6
    for name, found in (
        ("torch int4·g128", int4_seconds(outer, inner, count, GROUP)),
        ("gemlite int4·g128", gemlite_seconds(outer, inner, count)),
        ("marlin int4·g128", marlin_seconds(outer, inner, count, marlin)),
    ):
        if found is not None:
            yield name, found * 1e6


def gemlite_seconds(outer: int, inner: int, count: int) -> float | None:
    """Return the seconds of gemlite's int4 product; None where it is not installed, or has none of
    this size."""
    if importlib.util.find_spec("gemlite") is None or inner % GROUP or outer % 128:
        return None
    import gemlite  # type: ignore[import-not-found]
    from gemlite.core import DType, GemLiteLinear  # type: ignore[import-not-found]

    if torch.cuda.get_device_capability() == (9, 0):  # it has settings for an H100 only
        gemlite.load_config(str(Path(gemlite.__file__).parent / "configs" / "h100.json"))

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


def marlin_seconds(outer: int, inner: int, count: int, library: Path | None) -> float | None:
    """Return the seconds of Marlin's int4 product; None where its library is not there, or has none
    of this size. All weights are 1/2 while it is checked: their order is Marlin's own."""
    if library is None or outer % 256 or inner % GROUP or count > 64:
        return None
    product = ctypes.CDLL(str(library.resolve())).marlin_product
    copies = min(MOST_COPIES, max(2, -(-CACHED // (outer * inner // 2))))
    sizes = inner // 16, outer * 2
    nines = torch.full(sizes, 0x99999999 - (1 << 32), dtype=torch.int32, device="cuda")
    halves = torch.full((inner // GROUP, outer), 0.5, dtype=torch.float16, device="cuda")
    x = torch.randn(count, inner, device="cuda").half()
    result = torch.empty(count, outer, dtype=torch.float16, device="cuda")
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    sums = torch.empty(programs * 64 * 256, device="cuda")
    locks = torch.zeros(4096, dtype=torch.int32, device="cuda")

    def multiply(weight: tuple[Tensor, Tensor]) -> None:
        arrays = (x, *weight, result, sums, locks)
        pointers = [ctypes.c_void_p(each.data_ptr()) for each in arrays]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = product(*pointers, count, outer, inner, stream)
        if code:
            raise RuntimeError(f"Marlin's launch of {outer} x {inner} failed: CUDA error {code}")

    multiply((nines, halves))
    expected = x.double().sum(1, keepdim=True).expand(count, outer) / 2
    error = float((result.double() - expected).norm() / expected.norm())
    if not error < GOOD:
        raise RuntimeError(f"Marlin's product of {outer} x {inner} is off by {error}")
    weights = [
        (
            torch.randint(-(1 << 31), 1 << 31, sizes, dtype=torch.int32, device="cuda"),
            halves.clone(),
        )
        for _ in range(copies)
    ]
    return time_torch(multiply, weights)


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
