"""Where the loss of a quantized model comes from: figures for every layer and every pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qc.errors import ArtifactError
from qc.runtime.tables import format_table

__all__ = ["Explanation", "LayerFigures", "PassFigures"]

FIGURES = "explain/figures.json"
"""Where an artifact keeps its explanation."""


@dataclass(frozen=True)
class PassFigures:
    """One layer after one pass: stored bits a weight, and errors against the weight before
    anything was lost, relative: |W - W'| / |W|, |X (W - W')^T| / |X W^T|."""

    name: str
    format: str
    bits: float
    weight_error: float
    output_error: float


@dataclass(frozen=True)
class LayerFigures:
    """One stored matrix: what each pass did to it, and what that costs the model. `position`
    counts the layers in the order of the graph.

    `divergence` is KL(original || model) of the logits, nats a token, when this layer alone is
    quantized; None where it was not measured. `suggestion` says what would help most for its bits.
    """

    name: str
    position: int
    shape: tuple[int, int]
    bits_before: float
    steps: tuple[PassFigures, ...]
    divergence: float | None = None
    suggestion: str = ""

    @property
    def bits(self) -> float:
        return self.steps[-1].bits

    @property
    def stored(self) -> str:
        return self.steps[-1].format

    @property
    def weight_error(self) -> float:
        return self.steps[-1].weight_error

    @property
    def output_error(self) -> float:
        return self.steps[-1].output_error

    @property
    def loss(self) -> float:
        """What layers are sorted by: the divergence, or the output error without it."""
        return self.output_error if self.divergence is None else self.divergence


@dataclass(frozen=True)
class Explanation:
    """The figures of all quantized layers, the worst first. str() is a table.

    Output errors are of `tokens` calibration tokens, divergences of `divergence_tokens` (0: not
    measured); `divergence` is that of the whole model, activations included.
    """

    source: str
    recipe: str
    tokens: int
    divergence_tokens: int
    layers: tuple[LayerFigures, ...]
    divergence: float | None = None

    @property
    def bits(self) -> float:
        """Stored bits a weight over all layers."""
        return self.mean_bits([layer.bits for layer in self.layers])

    @property
    def bits_before(self) -> float:
        return self.mean_bits([layer.bits_before for layer in self.layers])

    def mean_bits(self, bits: list[float]) -> float:
        """Average bits a weight over the weights of all layers."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        total = sum(bit * size for bit, size in zip(bits, sizes, strict=True))
        return total / max(1, sum(sizes))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON."""
        return asdict(self)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row a layer, the worst first."""
        return [
            {
                "layer": layer.name,
                "stored": layer.stored,
                "bits": f"{layer.bits_before:.0f} → {layer.bits:.2f}",
                "weight error": layer.weight_error,
                "output error": layer.output_error,
                "KL": layer.divergence,
                "suggestion": layer.suggestion,
            }
            for layer in self.layers
        ]

    def in_order(self) -> list[LayerFigures]:
        """Return the layers as the graph has them."""
        return sorted(self.layers, key=lambda layer: layer.position)

    def by_pass(self) -> list[dict[str, Any]]:
        """Return the mean errors and bits of all layers after each pass, in order."""
        names = list(dict.fromkeys(step.name for layer in self.layers for step in layer.steps))
        rows = []
        for name in names:
            steps = [step for layer in self.layers for step in layer.steps if step.name == name]
            count = len(steps)
            rows.append({
                "pass": name,
                "layers": count,
                "bits": round(sum(step.bits for step in steps) / count, 3),
                "weight error": sum(step.weight_error for step in steps) / count,
                "output error": sum(step.output_error for step in steps) / count,
            })  # fmt: skip
        return rows

    def headline(self) -> str:
        """Say in two lines what was measured."""
        lines = [
            f"{len(self.layers)} layers, {self.bits_before:.2f} → {self.bits:.2f} bits a weight; "
            f"errors of outputs on {self.tokens:,} tokens"
        ]
        if self.divergence is not None:
            parts = sum(layer.divergence or 0.0 for layer in self.layers)
            lines.append(
                f"KL from the original: {self.divergence:.4g} nats a token with everything "
                f"quantized; layers one at a time sum to {parts:.4g} "
                f"({self.divergence_tokens} tokens)"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        tables = (format_table(self.rows()), format_table(self.by_pass()), self.headline())
        return "\n\n".join(tables)


def read_explanation(content: Mapping[str, Any]) -> Explanation:
    """Invert `Explanation.to_dict`; ArtifactError where something is missing or of another kind."""
    try:
        layers = tuple(read_layer(each) for each in content["layers"])
        divergence = content["divergence"]
        return Explanation(
            str(content["source"]), str(content["recipe"]), int(content["tokens"]),
            int(content["divergence_tokens"]), layers,
            None if divergence is None else float(divergence),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ArtifactError(f"the explanation is damaged: {error!r}") from None


def read_layer(content: Mapping[str, Any]) -> LayerFigures:
    """Read one layer."""
    rows, cols = (int(size) for size in content["shape"])
    steps = tuple(
        PassFigures(
            str(step["name"]), str(step["format"]), float(step["bits"]),
            float(step["weight_error"]), float(step["output_error"]),
        )
        for step in content["steps"]
    )  # fmt: skip
    if not steps:
        raise ValueError("a layer without passes")
    divergence = content["divergence"]
    return LayerFigures(
        str(content["name"]), int(content["position"]), (rows, cols),
        float(content["bits_before"]), steps,
        None if divergence is None else float(divergence), str(content["suggestion"]),
    )  # fmt: skip
