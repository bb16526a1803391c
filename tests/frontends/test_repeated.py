"""Equal layers are traced once: the graph is the one that tracing all of them gives."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qc.frontends import repeated
from qc.frontends.repeated import find_groups
from qc.frontends.torch_export import capture
from qc.ir.graph import Graph
from tests import families

DEPTH = 5
QUICK = ("llama", "gpt2")


def deep(family: str) -> nn.Module:
    layers = "n_layer" if "n_layer" in families.FAMILIES[family] else "num_hidden_layers"
    model: nn.Module = families.build(family, **{layers: DEPTH})
    return model


def capture_all(model: nn.Module, monkeypatch: pytest.MonkeyPatch, *example: Any) -> Graph:
    """Capture with every layer traced."""
    with monkeypatch.context() as patch:
        patch.setattr(repeated, "find_groups", lambda model: [])
        return capture(model, *example)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in families.FAMILIES
    ],
)
def test_the_graph_is_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep(family)
    assert find_groups(model)
    once, whole = capture(model), capture_all(model, monkeypatch)
    assert str(once) == str(whole)
    assert once.same_as(whole)


class Layer(nn.Module):
    """A linear, scaled by the number of the layer where `numbered`."""

    def __init__(self, number: int, *, numbered: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        self.number, self.numbered, self.scale = number, numbered, scale
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = self.linear(x) * self.scale
        if self.numbered:
            x = x * (self.number + 1)
        return x if bias is None else x + bias


class Stack(nn.Module):
    def __init__(self, *layers: Layer, biased: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.layers, self.biased = nn.ModuleList(layers), biased

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x, x) if number in self.biased else layer(x)
        return x


def compared(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether layers were repeated, after comparing the graphs."""
    example = [torch.randn(2, 8)]
    repeats: list[object] = []
    original = repeated.body_of

    def watched(*arguments: Any) -> Any:
        repeats.append(arguments)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("qc.frontends.torch_export.body_of", watched)
        once = capture(model, example)
    assert once.same_as(capture_all(model, monkeypatch, example))
    return bool(repeats)


def test_equal_layers_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compared(Stack(*map(Layer, range(4))), monkeypatch)


def test_a_layer_that_computes_with_its_number_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [Layer(number, numbered=True) for number in range(4)]
    assert not compared(Stack(*layers), monkeypatch)


def test_layers_of_other_options_are_not_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [Layer(number, scale=1.0 + number % 2) for number in range(6)]
    assert [len(group.paths) for group in find_groups(Stack(*layers))] == [3, 3]
    assert compared(Stack(*layers), monkeypatch)
    assert find_groups(Stack(*(Layer(n, scale=float(n)) for n in range(6)))) == []


def test_a_layer_called_with_other_arguments_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compared(Stack(*map(Layer, range(5)), biased=(2, 4)), monkeypatch)


def test_a_layer_with_a_hook_is_like_no_other() -> None:
    stack = Stack(*map(Layer, range(5)))
    stack.layers[3].linear.register_forward_hook(lambda module, inputs, output: None)
    assert [group.paths for group in find_groups(stack)] == [
        ("layers.0", "layers.1", "layers.2", "layers.4")
    ]


def test_the_model_is_left_as_it_was() -> None:
    stack = Stack(*map(Layer, range(4)))
    before = [dict(vars(module)) for module in stack.modules()]
    capture(stack, [torch.randn(2, 8)])
    assert [dict(vars(module)) for module in stack.modules()] == before
