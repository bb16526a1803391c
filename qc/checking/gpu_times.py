"""How long products take on a GPU, by what was measured on one.

A roofline says what memory and arithmetic allow, and would promise speed-ups that no kernel has:
launches wait for each other, codes are unpacked, entries are gathered. So times are linear in what
a product has to do, and the coefficients were fitted to every linear of benchmarks/measured by
benchmarks/gpu_model.py; too little is promised rather than too much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qc.ir.target import GPUS, Target

MEASURED_ON = GPUS["sm_90"]
"""What others are compared with: their memory and their tensor cores are faster or slower."""

KINDS = ("coded", "int8", "looked", "affine")
"""Rules of main loops that were measured; of others nothing is promised."""


@dataclass(frozen=True)
class GpuWork:
    """What a product with a stored matrix has to do. `launches` are those for up to 4, 16, 64 and
    more rows; none: it is torch's product with 16 bits."""

    bytes: int
    elements: int
    inner: int
    entries: int = 0
    planes: int = 1
    """Pieces that codes are unpacked from, of a weight."""
    launches: tuple[int, ...] = ()

    def seconds(self, rows: int, target: Target, cores: int) -> float:
        """Return how long it takes on the whole GPU."""
        gpu = target.gpu
        assert gpu is not None
        slower = MEASURED_ON.bandwidth / gpu.bandwidth
        busier = MEASURED_ON.operations / gpu.operations
        scale = (1.0, 1.0, slower, 1.0, busier, busier, busier, 1.0)
        known = SIXTEEN if not self.launches else TIMES
        coefficients = known[bucket_of(rows)]
        features = self.features(rows)
        terms = zip(coefficients, features, scale, strict=True)
        return 1e-6 * sum(c * f * s for c, f, s in terms)

    def features(self, rows: int) -> tuple[float, ...]:
        """Return what times are linear in: one launch, the others, megabytes, thousands of
        channels, 1e9 products, 1e8 codes unpacked, 1e8 products with entries, 10,000 outputs where
        channels do not suit the tiles for few rows."""
        more = self.launches[bucket_of(rows)] - 1 if self.launches else 0
        tiles = -(-rows // TILE)
        return (
            1.0, float(more), self.bytes / 1e6, self.inner / 1e3, self.elements * rows / 1e9,
            self.elements * self.planes * tiles / 1e8, self.entries * rows / 1e8,
            self.elements / self.inner / 1e4 if self.inner % LANES else 0.0,
        )  # fmt: skip


TILE, LANES = 64, 1024
BUCKETS = (4, 16, 64)
"""Rows up to which there are coefficients of their own."""


def bucket_of(rows: int) -> int:
    """Return which coefficients are for a number of rows."""
    return next((n for n, most in enumerate(BUCKETS) if rows <= most), len(BUCKETS))


Coefficients = Sequence[tuple[float, ...]]

SIXTEEN: Coefficients = (
    (3.05, 0.0, 0.213, 0.636, 5.48, 0.00106, 0.0, 0.355),
    (2.9, 0.0, 0.22, 0.71, 0.00176, 0.0011, 0.0, 0.47),
    (2.88, 0.0, 0.228, 0.769, 0.00729, 0.00114, 0.0, 0.627),
    (2.81, 0.0, 0.074, 0.959, 2.09, 0.327, 0.0, 1.4),
)  # fmt: skip
"""Of torch's products with float16, by buckets of rows: microseconds."""
TIMES: Coefficients = (
    (2.2, 1.19, 0.232, 0.127, 6.85, 3.51, 1640.0, 0.0),
    (2.32, 0.951, 0.216, 0.155, 2.97, 2.9, 312.0, 0.0),
    (4.14, 2.17, 0.0518, 0.391, 3.39, 3.67, 72.0, 0.803),
    (1.54, 3.63, 0.0121, 2.73, 3.54, 2.28, 52.3, 5.74),
)  # fmt: skip
"""Of products with stored weights."""
