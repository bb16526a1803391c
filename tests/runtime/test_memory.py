"""Memory: values that are alive at the same time never overlap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qc.errors import ArtifactError
from qc.runtime.dtypes import DTYPES
from qc.runtime.memory import Lifetime, StateMemory, aligned_bytes, plan_arena

lifetimes = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 6), st.integers(0, 1000)).map(
        lambda t: Lifetime(t[0], t[0] + t[1], t[2])
    ),
    max_size=25,
)


@given(lifetimes)
def test_values_alive_together_do_not_overlap(values: list[Lifetime]) -> None:
    offsets, total = plan_arena(values)
    assert total % 64 == 0
    placed = list(zip(values, offsets, strict=True))
    for at, (a, start) in enumerate(placed):
        assert start % 64 == 0
        assert start + a.bytes <= total or not a.bytes
        for b, other in placed[at + 1 :]:
            alive_together = a.first <= b.last and b.first <= a.last
            apart = start + a.bytes <= other or other + b.bytes <= start
            assert not alive_together or apart or not a.bytes or not b.bytes
    assert total <= sum(-(-v.bytes // 64) * 64 for v in values)


def test_memory_is_reused() -> None:
    chain = [Lifetime(at, at + 1, 100) for at in range(50)]
    assert plan_arena(chain)[1] == 2 * 128
    assert plan_arena([])[1] == 0


def test_arrays_are_aligned_and_bounded() -> None:
    assert aligned_bytes(0).size == 0
    for size in (1, 63, 64, 1000):
        array = aligned_bytes(size)
        assert array.size == size
        assert array.ctypes.data % 64 == 0
    with pytest.raises(ArtifactError, match=r"would need .* GiB"):
        aligned_bytes(2**50)
    with pytest.raises(ArtifactError, match=r"would need .* GiB"):
        StateMemory([(DTYPES["f32"], (2**50,))])


def test_state_grows_in_any_layout_and_clears() -> None:
    f16 = DTYPES["f16"]
    small = StateMemory([(f16, (1, 64, 3)), (f16, (2, 4, 16 * 3))])
    for array in small.arrays:
        array[...] = np.random.default_rng(0).normal(size=array.shape)
    large = StateMemory([(f16, (1, 128, 3)), (f16, (2, 8, 16 * 3))])
    large.copy_from(small)
    np.testing.assert_array_equal(large.arrays[0][:, :64], small.arrays[0])
    np.testing.assert_array_equal(large.arrays[1][:, :4], small.arrays[1])
    assert not large.arrays[0][:, 64:].any()
    address = large.arrays[0].ctypes.data
    large.clear()
    assert not any(array.any() for array in large.arrays)
    assert large.arrays[0].ctypes.data == address
