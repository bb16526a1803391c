"""Arrays that stay in files."""

from pathlib import Path

import pytest
import torch

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import make
from qc.ir.weights.dense import dense_in_file, dense_weight
from qc.ir.weights.grouped import GroupedFormat
from qc.ir.weights.mapped import Aside, MappedArrays, MappedTensor
from qc.ir.weights.weight import Weight
from qc.passes.prepare.sharing import share

SHAPE = (70, 64)


@pytest.fixture
def places(tmp_path: Path) -> list[MappedTensor]:
    """Three matrices in one file, the last two at odd offsets."""
    path = tmp_path / "file"
    matrices = [torch.full(SHAPE, float(n)) for n in range(3)]
    path.write_bytes(b"---" + b"".join(m.numpy().tobytes() for m in matrices))
    file = open(path, "rb", buffering=0)  # noqa: SIM115 - the tensors keep it
    return [MappedTensor(file, 3 + n * 70 * 64 * 4, SHAPE, torch.float32) for n in range(3)]


def maps_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def test_a_tensor_is_mapped_while_it_is_held(places: list[MappedTensor], tmp_path: Path) -> None:
    assert maps_of(tmp_path) == 0
    opened = places[1].open()
    assert maps_of(tmp_path) == 1
    assert torch.equal(opened, torch.full(SHAPE, 1.0))
    kept = opened[3:]
    del opened
    assert maps_of(tmp_path) == 1
    del kept
    assert maps_of(tmp_path) == 0


def test_writing_to_a_mapped_tensor_leaves_the_file(places: list[MappedTensor]) -> None:
    places[0].open().fill_(9.0)
    assert torch.equal(places[0].open(), torch.zeros(SHAPE))


def test_rows_are_a_smaller_place(places: list[MappedTensor], tmp_path: Path) -> None:
    term = dense_in_file(places[2])
    part = term.rows(torch.arange(5, 9))
    assert part is not None
    assert isinstance(part.stored, MappedArrays)
    assert torch.equal(part.dense(), torch.full((4, 64), 2.0))
    scattered = term.rows(torch.tensor([1, 7]))
    assert scattered is not None
    assert scattered.shape == (2, 64)


def test_equal_places_are_one_parameter_and_others_are_not(places: list[MappedTensor]) -> None:
    def parameter(place: MappedTensor) -> ops.Parameter:
        return ops.Parameter(Weight("w", SHAPE, (dense_in_file(place),)))

    again = MappedTensor(places[0].file, places[0].start, SHAPE, torch.float32)
    nodes = [make(parameter(place)) for place in (*places, again)]
    shared = share(Graph((), tuple(nodes), ("a", "b", "c", "d"))).outputs
    assert len(set(shared[:3])) == 3
    assert shared[3] is shared[0]


def test_weights_beyond_the_budget_lie_in_a_file() -> None:
    format = GroupedFormat(4, 32, "minimum")
    terms = [format.nearest(torch.randn(*SHAPE)) for _ in range(3)]
    weights = [Weight(f"w{n}", SHAPE, (term,)) for n, term in enumerate(terms)]
    aside = Aside(budget=weights[0].bits // 8)
    placed = [aside.place(weight) for weight in weights]
    assert [isinstance(w.terms[0].stored, MappedArrays) for w in placed] == [False, True, True]
    for before, after in zip(weights, placed, strict=True):
        assert before.bits == after.bits
        arrays = after.arrays()
        assert all(torch.equal(array, arrays[name]) for name, array in before.arrays().items())


def test_empty_and_small_arrays_lie_in_a_file_too() -> None:
    weight = dense_weight("w", torch.zeros(0, 5))
    placed = Aside(budget=-1).place(weight)
    assert placed.dense().shape == (0, 5)
    half = dense_weight("h", torch.tensor([1.5, 2.5], dtype=torch.bfloat16))
    assert torch.equal(Aside(budget=0).place(half).dense(), half.dense())
