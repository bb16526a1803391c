"""The safetensors reader and writer: round trips, alignment, and no trust in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qc.errors import ArtifactError
from qc.runtime.dtypes import DTYPES
from qc.runtime.safetensors_file import SafetensorsFile, TensorSource, write_safetensors

SHARED_FOLDER = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)
NUMPY_DTYPES = sorted({d.numpy.str for d in DTYPES.values()})

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(
    lambda name: not name.startswith("__")
)
arrays = st.sampled_from(NUMPY_DTYPES).flatmap(
    lambda dtype: hnp.arrays(
        dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)
    )
)


@SHARED_FOLDER
@given(st.dictionaries(names, arrays, max_size=6))
def test_what_is_written_is_read(tmp_path: Path, tensors: dict[str, Any]) -> None:
    path = tmp_path / "t.safetensors"
    assert write_safetensors(path, tensors, {"made": "here"}) == path.stat().st_size
    found = SafetensorsFile(path)
    assert list(found) == list(tensors)
    assert found.metadata == {"made": "here"}
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
        assert found[name].ctypes.data % 64 == 0 or not array.size


def test_the_safetensors_library_reads_our_files_and_we_read_its(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    tensors: dict[str, Any] = {
        "odd": np.arange(7, dtype=np.float32),
        "half": np.ones((3, 5), np.float16),
        "bytes": np.arange(33, dtype=np.uint8),
    }
    write_safetensors(tmp_path / "ours", tensors)
    found = library.load_file(tmp_path / "ours")
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)
    library.save_file(tensors, tmp_path / "theirs")
    theirs = SafetensorsFile(tmp_path / "theirs")
    assert sorted(theirs) == sorted(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(theirs[name], array)


def test_sources_are_loaded_in_their_turn_and_must_keep_their_promise(tmp_path: Path) -> None:
    loaded: list[str] = []

    def source(name: str) -> TensorSource:
        def load() -> Any:
            loaded.append(name)
            return np.zeros(4, np.uint16)

        return TensorSource("bf16", (2, 2), load)

    write_safetensors(tmp_path / "t", {"a": source("a"), "b": source("b")})
    assert loaded == ["a", "b"]
    assert SafetensorsFile(tmp_path / "t").entries["a"].dtype.name == "bf16"
    with pytest.raises(ArtifactError, match=r"'a' was promised as f32\[2\] and came as float64"):
        write_safetensors(tmp_path / "t", {"a": TensorSource("f32", (2,), lambda: np.zeros(2))})
    with pytest.raises(ArtifactError, match="reserved"):
        write_safetensors(tmp_path / "t", {"__pad_1": np.zeros(2)})
    with pytest.raises(ArtifactError, match="cannot hold arrays of complex64"):
        write_safetensors(tmp_path / "t", {"a": np.zeros(2, np.complex64)})


def test_maps_are_private(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "t", {"a": np.zeros(3)})
    SafetensorsFile(tmp_path / "t")["a"][:] = 5
    assert SafetensorsFile(tmp_path / "t")["a"].tolist() == [0, 0, 0]
    with pytest.raises(ArtifactError, match=r"no tensor 'b'"):
        SafetensorsFile(tmp_path / "t")["b"]


def file_of(header: object, data: int = 16, length: int | None = None) -> bytes:
    """Make a file of a header and so many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def record(start: int = 0, end: int = 16, dtype: str = "F32", shape: Any = (4,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut off"),
        (b"1234567", "cut off"),
        (file_of({}, length=10**9), "more than 100 MB"),
        (file_of({}, length=2**64 - 1), "more than 100 MB"),
        (file_of({}, 0, length=50), "cut off"),
        (file_of(b"\xff\xfe{}", 0), "not UTF-8"),
        (file_of(b"[" * 100_000, 0), "not JSON|nested too deeply|elements"),
        (file_of(b"[]", 0), "not a JSON object"),
        (file_of(b'{"a": NaN}', 0), "NaN, which is not JSON"),
        (file_of(b'{"a": ' + b"9" * 5000 + b"}", 0), "not JSON"),
        (file_of(b"{" + b"," * 5_000_000 + b"}", 0), "elements"),
        (file_of(b'{"a": 1, "a": 2}', 0), "the name 'a' twice"),
        (file_of({"a": 1}), "needs exactly dtype, shape and data_offsets"),
        (file_of({"a": record() | {"more": 1}}), "needs exactly"),
        (file_of({"a": record(dtype="F8_E5M2")}), "unknown dtype 'F8_E5M2'"),
        (file_of({"a": record() | {"dtype": ["F32"]}}), "unknown dtype"),
        (file_of({"a": record(shape=[-4])}), "no proper shape"),
        (file_of({"a": record(shape=[4.0])}), "no proper shape"),
        (file_of({"a": record(shape=[True])}), "no proper shape"),
        (file_of({"a": record(shape="4")}), "no proper shape"),
        (file_of({"a": record(shape=[1] * 40)}), "no proper shape"),
        (file_of({"a": record(shape=[2**62, 2**62])}), "needs .* bytes for its shape"),
        (file_of({"a": record(shape=[5])}), "needs 20 bytes for its shape and has 16"),
        (file_of({"a": record(-16, 0)}), "no proper data_offsets"),
        (file_of({"a": record(16, 0)}), "lies outside the file"),
        (file_of({"a": record(0, 32, shape=[8])}), "lies outside the file"),
        (file_of({"a": record(2**62, 2**62 + 16)}), "lies outside the file"),
        (file_of({"a": record(), "b": record()}), "overlaps the one before it"),
        (file_of({"a": record(0, 8, shape=[2]), "b": record(4, 16, shape=[3])}), "overlaps"),
        (file_of({"a": record(4, 16, shape=[3])}), "leaves a hole"),
        (file_of({"a": record()}, data=17), "tensors end at byte"),
        (file_of({"__metadata__": {"a": 1}}, 0), "not a table of texts"),
        (file_of({"__metadata__": [1]}, 0), "not a table of texts"),
    ],
)
def test_malformed_files_get_one_clear_sentence(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=message) as caught:
        SafetensorsFile(path)
    assert "\n" not in str(caught.value)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot read .*absent: No such file"):
        SafetensorsFile(tmp_path / "absent")


def read_all(path: Path) -> None:
    """Read every byte of every tensor, if the file is well-formed."""
    try:
        for array in SafetensorsFile(path).values():
            array.tobytes()
    except ArtifactError:
        pass


def valid_file(path: Path) -> bytes:
    write_safetensors(path, {"a": np.arange(5), "b": np.ones((2, 3), np.float16)})
    return path.read_bytes()


@SHARED_FOLDER
@given(st.data())
def test_damaged_files_are_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "t"
    content = bytearray(valid_file(path))
    if data.draw(st.booleans()):
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, 300))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
    read_all(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
records = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "U8", "BOOL", "X"]) | json_values,
        "shape": st.lists(st.integers(-2, 2**65) | st.integers(0, 4), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(-8, 2**65) | st.integers(0, 32), max_size=3)
        | json_values,
    }
)


@SHARED_FOLDER
@given(
    st.dictionaries(st.text(max_size=8), records | json_values, max_size=4) | json_values,
    st.integers(0, 64),
)
def test_made_up_headers_are_refused_or_harmless(tmp_path: Path, header: Any, data: int) -> None:
    path = tmp_path / "t"
    path.write_bytes(file_of(header, data))
    read_all(path)


@SHARED_FOLDER
@given(st.binary(max_size=300), st.integers(0, 400))
def test_noise_is_refused_or_harmless(tmp_path: Path, noise: bytes, length: int) -> None:
    path = tmp_path / "t"
    path.write_bytes(length.to_bytes(8, "little") + noise)
    read_all(path)
