"""A captured graph computes what the module computes, for sizes that export never saw."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5Model

from qc.errors import ModelError, UnsupportedError
from qc.frontends import open_model
from qc.frontends.torch_export import capture
from qc.ir import ops
from qc.ir.meaning import evaluate
from qc.ir.types import symbol
from qc.passes.exactness import distance
from tests import families
from tests.families import DECODERS, FAMILIES


class Function(nn.Module):
    """A module that applies a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch", "seq"), [(1, 5), (3, 17)])
def test_families_keep_their_meaning(family: str, batch: int, seq: int) -> None:
    graph, values = families.captured(family), families.inputs(family, batch, seq)
    (result,) = evaluate(graph, values).values()
    assert distance(families.first_output(families.model_of(family), values), result) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_signature(family: str) -> None:
    graph = families.captured(family)
    assert graph.output_names == ("logits" if family in DECODERS else "last_hidden_state",)
    (node,) = graph.inputs
    if family == "vit":
        assert node.tensor.shape == (symbol("batch"), 3, families.IMAGE, families.IMAGE)
    else:
        assert node.tensor.shape == (symbol("batch"), symbol("seq"))


def test_weights_share_memory_and_keep_names() -> None:
    model = families.model_of("llama")
    own = dict(model.named_parameters())
    stored = {n.op.weight.name: n.op.weight for n in families.captured("llama").parameters}
    assert own.keys() <= stored.keys()
    for name, parameter in own.items():
        assert stored[name].arrays()["0.values"].data_ptr() == parameter.data_ptr()


def test_tied_weights_are_one_node() -> None:
    table = (families.VOCABULARY, 64)
    assert [n.op.weight.shape for n in families.captured("gpt2").parameters].count(table) == 1
    assert [n.op.weight.shape for n in families.captured("llama").parameters].count(table) == 2


def test_origins_are_module_paths() -> None:
    linears = [n for n in families.captured("llama").nodes if "linear" in n.op.attributes()]
    assert linears[0].origin.module == "model.layers.0.self_attn.q_proj"


def test_half_precision_stays_stored_and_computes_in_float32() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU()).to(torch.bfloat16)
    graph = capture(model, (torch.randn(2, 8),))
    weight = next(n.op.weight for n in graph.parameters if n.op.weight.name == "0.weight")
    assert str(weight.format) == "dense bf16"
    assert weight.dtype == torch.float32
    assert model[0].weight.dtype == torch.bfloat16
    x = torch.randn(5, 8)
    assert torch.equal(evaluate(graph, {"input": x})["output"], model.float()(x))


def test_a_batch_of_one_becomes_dynamic() -> None:
    graph = capture(nn.Linear(8, 4), torch.randn(1, 8))
    assert evaluate(graph, {"input": torch.randn(7, 8)})["output"].shape == (7, 4)


def test_in_place_operations() -> None:
    def in_place(x: Tensor) -> Tensor:
        y = x * 2
        y[:, 1] += 1
        return y.relu_()

    graph, x = capture(Function(in_place), (torch.randn(3, 4),)), torch.randn(5, 4)
    assert torch.equal(evaluate(graph, {"x": x})["output"], in_place(x))


def test_training_mode_comes_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    model.train()
    model[0].eval()
    graph, x = capture(model, (torch.randn(2, 4),)), torch.randn(3, 4)
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    assert torch.equal(evaluate(graph, {"input": x})["output"], model[0](x))


def test_disabled_gradients_and_autocast_are_inlined() -> None:
    def blocks(x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            y = x.sin()
        return y + x

    graph, x = capture(Function(blocks), (torch.randn(3, 4),)), torch.randn(5, 4)
    assert torch.equal(evaluate(graph, {"x": x})["output"], blocks(x))


def test_facts() -> None:
    model = open_model(families.model_of("llama"))
    assert (model.name, model.vocabulary, model.context_length) == ("llama", 128, 64)
    assert (model.bos_id, model.eos_ids, model.tokenizer) == (1, (2,), None)


def test_several_results_are_items() -> None:
    graph = capture(Function(lambda x: x.topk(2)[1]), (torch.randn(3, 4),))
    assert isinstance(graph.outputs[0].op, ops.Item)


def test_control_flow_on_values_is_refused_in_one_line() -> None:
    with pytest.raises(ModelError, match=r"^torch.export cannot capture Function: .*$"):
        capture(Function(lambda x: x if x.sum() > 0 else -x), (torch.randn(3, 4),))


def test_sizes_that_depend_on_values_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="depends on values"):
        capture(Function(lambda x: x.nonzero()), (torch.randn(3, 4),))


def test_a_plain_module_needs_an_example() -> None:
    with pytest.raises(ModelError, match="Linear is no transformers model: give example inputs"):
        open_model(nn.Linear(2, 2))


def test_encoder_decoders_are_refused() -> None:
    config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedError, match="T5Model is an encoder-decoder"):
        open_model(T5Model(config))


def test_models_of_one_size_are_refused() -> None:
    model = families.build("llama", num_hidden_layers=1)

    def fix_length(module: nn.Module, arguments: tuple[Tensor]) -> None:
        torch.linspace(0, 1, arguments[0].shape[1])  # takes an int

    model.model.embed_tokens.register_forward_pre_hook(fix_length)
    with pytest.raises(UnsupportedError, match="works for one size of its input only"):
        capture(model)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ModelError, match="not 3"):
        open_model(3)  # type: ignore[arg-type]
