"""Passes and pipelines: run a list of passes, check stages and exactness, keep a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from qc.errors import RecipeError, VerificationError
from qc.ir.graph import Graph
from qc.ir.target import Target
from qc.passes.exactness import relative_difference
from qc.passes.stage import CAPTURED, Stage

if TYPE_CHECKING:
    from qc.ir.weights.weight import WeightFormat
    from qc.passes.calibration import Calibration


@dataclass(frozen=True)
class Step:
    """One line of the log: what a pass did and how long it took."""

    name: str
    seconds: float
    changed: int

    @property
    def text(self) -> str:
        """The line without the time: equal compilations write equal artifacts."""
        changes = f"{self.changed} nodes changed" if self.changed else "(unchanged)"
        return f"{self.name:<24} {changes}"

    def __str__(self) -> str:
        return f"{self.seconds:7.2f} s   {self.text}"


@dataclass(frozen=True)
class Context:
    """What a pass may know besides the graph: the target, data to calibrate on, and where to
    report progress."""

    target: Target
    progress: Callable[[str, float], None] = lambda text, fraction: None
    log: list[Step] = field(default_factory=list)
    calibration: Calibration | None = None

    def data(self, one: Pass) -> Calibration:
        """Return the calibration that `one` needs; RecipeError where there is none."""
        if self.calibration is None:
            raise RecipeError(
                f"pass {one.name} looks at data: run it with a calibration, "
                "such as Context(target, calibration=Calibration(texts))"
            )
        return self.calibration


@dataclass(frozen=True)
class Refusal:
    """A weight that a pass cannot store as it is asked to. `instead` is a format that works."""

    weight: str
    shape: tuple[int, ...]
    format: str
    reason: str
    instead: str

    def __str__(self) -> str:
        return (
            f"weight {self.weight!r} {list(self.shape)} cannot be stored as {self.format}: "
            f"{self.reason}; {self.instead} can"
        )


@dataclass(frozen=True)
class Pass:
    """Graph -> Graph. Fields are options; the repr is the configuration."""

    name: ClassVar[str]
    requires: ClassVar[Stage] = CAPTURED
    ensures: ClassVar[Stage] = CAPTURED
    exact: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = False
    """The pass prepares weights for the format in which a later one stores them."""

    def run(self, graph: Graph, context: Context) -> Graph:
        """Return the transformed graph."""
        raise NotImplementedError

    def refusals(self, graph: Graph) -> list[Refusal]:
        """List the weights that `run` would refuse for their shapes."""
        return []

    def storing(self, format: WeightFormat) -> Pass | None:
        """Return this pass storing linears in another format; None where it stores none."""
        return None

    def resized(self, bits: int | None, group: int | None) -> Pass | None:
        """Return this pass storing linears in so many bits, in groups of so many inputs; None
        where it has no such size. FormatError where its format does not."""
        return None

    def preview(self, graph: Graph) -> Graph | None:
        """Return what `run` makes of a graph whose matrices have no values: shapes and formats.

        None where that takes values. A pass that reads them, and knows without them what it will
        store, says so here.
        """
        try:
            return self.run(graph, Context(Target("any", "any")))
        except RuntimeError:  # what torch raises where an array without values is read
            return None


@dataclass(frozen=True)
class Pipeline:
    """A list of passes. `tolerance` is the relative difference that an exact pass may show when
    `verify` compares the outputs before and after it on random inputs."""

    passes: tuple[Pass, ...]
    verify: bool = False
    tolerance: float = 1e-4

    def __init__(
        self, passes: Sequence[Pass] = (), verify: bool = False, tolerance: float = 1e-4
    ) -> None:
        object.__setattr__(self, "passes", tuple(passes))
        object.__setattr__(self, "verify", verify)
        object.__setattr__(self, "tolerance", tolerance)

    def __add__(self, other: Pipeline | Sequence[Pass]) -> Pipeline:
        more = other.passes if isinstance(other, Pipeline) else tuple(other)
        return replace_passes(self, (*self.passes, *more))

    def replace(self, old: type[Pass], new: Pass) -> Pipeline:
        """Return the pipeline with `new` in place of every pass of type `old`."""
        return replace_passes(self, tuple(new if isinstance(p, old) else p for p in self.passes))

    def run(self, graph: Graph, context: Context) -> Graph:
        """Run all passes in order; VerificationError names the pass that broke a law."""
        for number, one in enumerate(self.passes):
            context.progress(one.name, number / len(self.passes))
            graph = self.run_pass(one, graph, context)
        context.progress("", 1.0)
        return graph

    def run_pass(self, one: Pass, before: Graph, context: Context) -> Graph:
        """Run one pass between its stage checks."""
        one.requires.check(before)
        start = time.perf_counter()
        after = one.run(before, context)
        seconds = time.perf_counter() - start
        changed = len(set(after.nodes) - set(before.nodes))
        context.log.append(Step(one.name, seconds, changed))
        one.ensures.check(after)
        if self.verify and one.exact and changed:
            difference = relative_difference(before, after)
            if difference > self.tolerance:
                raise VerificationError(
                    f"pass {one!r} says that it is exact, but moved an output by {difference:.2e}"
                )
        return after


def replace_passes(pipeline: Pipeline, passes: tuple[Any, ...]) -> Pipeline:
    """Copy a pipeline with other passes."""
    return Pipeline(passes, pipeline.verify, pipeline.tolerance)
