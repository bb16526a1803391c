"""A GGUF file becomes the model it was written from; a damaged one is refused in one sentence."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qc.errors import ModelError
from qc.frontends import open_model
from qc.frontends.gguf_file import Cursor, parse, read_gguf
from qc.ir.meaning import evaluate
from qc.passes.exactness import distance
from tests import families

HEADS, KV_HEADS = 4, 2


def write(path: Path, model: Any) -> Path:
    """Write a llama as llama.cpp does: pairs of rotated channels beside each other."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj.weight": HEADS, "k_proj.weight": KV_HEADS}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        for suffix, count in heads.items():
            if name.endswith(suffix):
                halves = values.reshape(count, 2, -1, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        kept = np.float32 if values.ndim == 1 else np.float16
        writer.add_tensor(names.get_name(name, (".weight",)), values.astype(kept))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = families.build("llama", num_hidden_layers=1).half().float()
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


@pytest.fixture(scope="module")
def content(file: Path) -> bytes:
    return file.read_bytes()


def test_a_file(file: Path) -> None:
    opened = open_model(file)
    assert (opened.name, opened.vocabulary, opened.context_length) == ("llama", 128, 64)
    assert opened.tokenizer is None  # the file has none
    model = families.build("llama", num_hidden_layers=1)
    model = model.half().float()
    values = families.inputs("llama", 2, 7)
    result = evaluate(opened.graph, values)["logits"]
    assert distance(families.first_output(model, values), result) < 1e-5


def test_reads_what_the_gguf_package_reads(file: Path) -> None:
    own, reference = read_gguf(file), gguf.GGUFReader(file)
    theirs = {name: f for name, f in reference.fields.items() if not name.startswith("GGUF.")}
    assert own.fields.keys() == theirs.keys()
    for name, field in own.fields.items():
        assert field.types == theirs[name].types
        assert [field.parts[i].tolist() for i in field.data] == [
            theirs[name].parts[i].tolist() for i in theirs[name].data
        ]
    for ours, tensor in zip(own.tensors, reference.tensors, strict=True):
        assert (ours.name, ours.tensor_type) == (tensor.name, tensor.tensor_type)
        np.testing.assert_array_equal(ours.data, tensor.data)


def refused(content: bytes) -> str:
    """Return the sentence that refuses this content."""
    with pytest.raises(ValueError, match=r".") as raised:
        parse(Cursor(np.frombuffer(content, np.uint8)))
    return str(raised.value)


def header(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(sizes: tuple[int, ...], kind: int = 0, offset: int = 0, name: bytes = b"w") -> bytes:
    shape = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def key(kind: int, value: bytes, name: bytes = b"k") -> bytes:
    return text(name) + struct.pack("<I", kind) + value


ZEROS = bytes(64)
ALIGNMENT = b"general.alignment"
MALICIOUS = {
    "does not start with GGUF": b"GGML" + ZEROS,
    "version 1": header(version=1) + ZEROS,
    "version 50331648": header(version=3 << 24) + ZEROS,
    "within its header": b"GGUF\x03\0\0",
    f"announces {2**63} tensors": header(tensors=2**63) + ZEROS,
    f"announces {2**63} keys": header(keys=2**63) + ZEROS,
    f"announces {2**62} characters": header(keys=1) + struct.pack("<Q", 2**62) + ZEROS,
    f"announces {2**61} numbers": header(keys=1) + key(9, struct.pack("<IQ", 4, 2**61)) + ZEROS,
    f"announces {2**60} strings": header(keys=1) + key(9, struct.pack("<IQ", 8, 2**60)) + ZEROS,
    "array of the unknown type 9": header(keys=1) + key(9, struct.pack("<IQ", 9, 1)) + ZEROS,
    "value of the unknown type 77": header(keys=1) + key(77, ZEROS),
    "key 'k' twice": header(keys=2) + 2 * key(7, b"\1") + ZEROS,
    "name of 0 bytes": header(keys=1) + key(7, b"\1", b"") + ZEROS,
    "alignment is 3": header(keys=1) + key(4, struct.pack("<I", 3), ALIGNMENT) + ZEROS,
    "alignment is 0": header(keys=1) + key(4, struct.pack("<I", 0), ALIGNMENT) + ZEROS,
    "general.alignment": header(keys=1) + key(8, text(b"32"), ALIGNMENT) + ZEROS,
    "has 5 axes": header(tensors=1) + tensor((1, 1, 1, 1, 1)) + ZEROS,
    "unknown type 4711": header(tensors=1) + tensor((8,), 4711) + ZEROS,
    "impossible for Q4_0": header(tensors=1) + tensor((31,), 2) + ZEROS,
    "impossible for F32": header(tensors=1) + tensor((0,)) + ZEROS,
    "does not lie within": header(tensors=1) + tensor((2**40, 2**40)) + ZEROS,
    "does not lie within the file": header(tensors=1) + tensor((4,), offset=2**63) + ZEROS,
    "tensor w does not lie": header(tensors=1) + tensor((4,), offset=3) + ZEROS,
    "overlaps": header(tensors=2) + tensor((4,)) + tensor((4,), name=b"v") + ZEROS,
    "tensor 'w' twice": header(tensors=2) + tensor((4,)) + tensor((4,), offset=32) + ZEROS,
}


@pytest.mark.parametrize("sentence", MALICIOUS)
def test_malicious_files(sentence: str) -> None:
    assert sentence in refused(MALICIOUS[sentence])


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(header(keys=1) + key(8, text(b"\xff")) + ZEROS)
    with pytest.raises(ModelError, match="not UTF-8"):
        read_gguf(path)


@given(data=st.data())
def test_every_truncation_is_refused(content: bytes, data: st.DataObject) -> None:
    refused(content[: data.draw(st.integers(0, len(content) - 64))])


@given(data=st.data())
def test_damage_is_refused_or_harmless(content: bytes, data: st.DataObject) -> None:
    """Whatever bytes of the header change, the reader answers or says what is wrong."""
    damaged = bytearray(content)
    places = st.integers(0, 2500)
    for position in data.draw(st.lists(places, min_size=1, max_size=8)):
        damaged[position] = data.draw(st.integers(0, 255))
    try:
        found = parse(Cursor(np.frombuffer(bytes(damaged), np.uint8)))
    except ValueError:
        return
    assert sum(t.data.nbytes for t in found.tensors) <= len(damaged)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it is empty"),
        (header() + ZEROS, "does not say what architecture"),
        (header(keys=1) + key(8, text(b"nonsense"), b"general.architecture") + ZEROS, "no model"),
    ],
)
def test_files_without_a_model(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=sentence) as raised:
        open_model(path)
    assert "\n" not in str(raised.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no file"):
        open_model(tmp_path / "absent.gguf")


def test_more_layers_than_tensors(file: Path, tmp_path: Path) -> None:
    damaged = bytearray(file.read_bytes())
    place = damaged.index(b"llama.block_count") + len(b"llama.block_count") + 4
    damaged[place : place + 4] = struct.pack("<I", 10**9)
    path = tmp_path / "deep.gguf"
    path.write_bytes(damaged)
    with pytest.raises(ModelError, match="announces 1000000000 layers"):
        open_model(path)


def test_shapes_that_do_not_fit(file: Path, tmp_path: Path) -> None:
    damaged = bytearray(file.read_bytes())
    place = damaged.index(b"llama.embedding_length") + len(b"llama.embedding_length") + 4
    damaged[place : place + 4] = struct.pack("<I", 128)
    path = tmp_path / "wide.gguf"
    path.write_bytes(damaged)
    with pytest.raises(ModelError, match=r"wide\.gguf"):
        open_model(path)
