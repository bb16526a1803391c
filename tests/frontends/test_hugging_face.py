"""Folders become graphs over their own files; a broken one gets its sentence before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qc.errors import ModelError, QcError, UnsupportedError
from qc.frontends import hugging_face, open_model
from qc.ir.meaning import evaluate
from qc.passes.exactness import distance
from tests import families


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer with tied embeddings."""
    path = tmp_path_factory.mktemp("llama")
    families.build("llama", num_hidden_layers=1, tie_word_embeddings=True).save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def no_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a test gets as far as building a model."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the source should have been refused before")

    monkeypatch.setattr(hugging_face, "build_untouched", refuse)
    monkeypatch.setattr(hugging_face, "capture", refuse)


def check(folder: Path, tolerance: float = 1e-5) -> Any:
    """Compare the captured graph with what transformers loads; return the capture."""
    opened = open_model(folder)
    model = families.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    values = families.inputs("llama", 2, 7)
    result = evaluate(opened.graph, values)["logits"]
    assert distance(families.first_output(model, values), result) < tolerance
    return opened


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_folder(folder: Path) -> None:
    opened = check(folder)
    assert (opened.name, opened.context_length, opened.eos_ids) == ("llama", 64, (2,))
    assert opened.tokenizer is None
    shapes = [node.op.weight.shape for node in opened.graph.parameters]
    assert shapes.count((families.VOCABULARY, 64)) == 1  # tied


def test_half_precision_is_stored_as_it_is(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    halves = {name: t.to(torch.bfloat16) for name, t in tensors.items()}
    save_file(halves, copy / "model.safetensors", {"format": "pt"})
    opened = check(copy)
    parameters = opened.graph.parameters
    matrices = {str(n.op.weight.format) for n in parameters if n.tensor.rank == 2}
    assert matrices == {"dense bf16"}
    assert {n.tensor.dtype for n in parameters} == {torch.float32}


def test_shards(folder: Path, tmp_path: Path) -> None:
    model = families.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check(tmp_path)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match="lacks the shard model-00002"):
        open_model(tmp_path)


def test_names_that_transformers_has_to_translate(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    inner = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(inner, copy / "model.safetensors", {"format": "pt"})
    check(copy)


def test_missing_weights(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights of the model, such as .*up_proj"):
        open_model(copy)


BROKEN: dict[str, tuple[Callable[[Path], object], type[QcError], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ModelError, "has no config.json"),
    "no json": (lambda f: (f / "config.json").write_text("{"), ModelError, "is no valid JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), ModelError, "holds no JSON object"),
    "unknown": (
        lambda f: edit(f / "config.json", lambda c: c.update(model_type="lama")),
        ModelError,
        "unknown model_type 'lama' .*llama",
    ),
    "own code": (
        lambda f: edit(f / "config.json", lambda c: c.update(model_type="x", auto_map={"a": "b"})),
        UnsupportedError,
        "brings its own code",
    ),
    "quantized": (
        lambda f: edit(
            f / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"})
        ),
        UnsupportedError,
        "is quantized already .by gptq",
    ),
    "too deep": (
        lambda f: edit(f / "config.json", lambda c: c.update(num_hidden_layers=10**9)),
        ModelError,
        "announces 1000000000 layers",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        ModelError,
        "has no weights: expected model.safetensors",
    ),
    "pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        ModelError,
        "pickle files, which can run any code",
    ),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-1000]
        ),
        ModelError,
        "is no intact safetensors file",
    ),
    "header too long": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
        ModelError,
        "is no intact safetensors file",
    ),
}


@pytest.mark.usefixtures("no_long_work")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders(name: str, copy: Path) -> None:
    damage, error, sentence = BROKEN[name]
    damage(copy)
    with pytest.raises(error, match=sentence) as raised:
        open_model(copy)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("no_long_work")
@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/model.safetensors", "model.bin", "absent.safetensors"]
)
def test_indexes_name_files_of_the_folder(shard: str, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy.parent / "model.safetensors")
    index = {"weight_map": {"lm_head.weight": shard}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names|lacks the shard"):
        open_model(copy)


@pytest.mark.parametrize("name", ["/no/such/folder", "no/such-model", "not a name"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}") as raised:
        open_model(name)
    assert "\n" not in str(raised.value)


def test_a_plain_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        open_model(tmp_path / "model.txt")
