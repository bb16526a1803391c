"""The manifest: what is written is read, and whatever else is read is refused in one sentence."""

from __future__ import annotations

import json
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qc.errors import ArtifactError
from qc.runtime import load
from qc.runtime.expression import parse_expression
from qc.runtime.manifest import KernelStep, Manifest, Scalar, TorchStep, Value, ValueArg
from tests.runtime import cuda, toy


def content() -> dict[str, Any]:
    """Return the toy manifest as JSON."""
    parsed: dict[str, Any] = json.loads(toy.language_manifest().to_json())
    return parsed


def test_what_is_written_is_read() -> None:
    manifest = toy.language_manifest(
        steps=(
            *toy.language_manifest().steps,
            KernelStep(
                "k",
                (ValueArg(2, ("batch * seq", 12), "seq // 2"), Scalar("past + seq")),
                reads=(2,),
                writes=(2,),
                when={"seq": (2, None)},
            ),
            TorchStep("aten::add.Tensor", ({"value": 2}, 1.5), (2,), (4,), {"alpha": 2}),
        )
    )
    again = Manifest.parse(manifest.to_json())
    assert again == manifest
    assert again.value_index("logits") == 5
    with pytest.raises(ArtifactError, match='did you mean "logits"'):
        again.value_index("logit")


def put(path: str, new: Any) -> Any:
    """Change one field of the toy manifest, given its dotted path; `...` deletes it."""

    def change(top: dict[str, Any]) -> None:
        *parents, last = [int(p) if p.isdecimal() else p for p in path.split(".")]
        here: Any = top
        for part in parents:
            here = here[part]
        if new is ...:
            del here[last]
        else:
            here[last] = new

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("qc", 2), "has format 2; this qc reads format 1"),
        (put("qc", "1"), '"qc" of the artifact must be an integer'),
        (put("qc", ...), 'the artifact has no "qc"'),
        (put("executor", "vm"), "needs the executor 'vm'"),
        (put("extra", 1), "the artifact has the unknown field 'extra'"),
        (put("symbols", ["batch", "batch"]), "two symbols are called 'batch'"),
        (put("symbols", ["1x"]), "'1x' cannot name a symbol"),
        (put("symbols.0", "rows"), "unknown symbol 'batch'"),
        (put("symbols", ["batch", "seq", "past", "keep", "context", "n"]), "dimension 'n'"),
        (put("values.0.dtype", "f8"), '"dtype" of value .input_ids. must be one of f64'),
        (put("values.0.kind", "constant"), '"kind" of .* must be one of input'),
        (put("values.0.kind", []), '"kind" of .* must be one of input'),
        (put("values.1.tensor", ...), "value 'table' has no \"tensor\""),
        (put("values.1.shape", ["seq", 12]), "weight 'table' must be made of integers"),
        (put("values.2.shape", ["past", 12]), 'may not use "past"'),
        (put("values.2.shape", [-1]), "has the size -1"),
        (put("values.2.shape", ["seq", 1.5]), "holds '1.5', not an expression"),
        (put("values.2.shape", ["seq.real"]), "is not an integer expression"),
        (put("values.2.shape", [1] * 9), "a list of at most 8"),
        (put("values.3.shape", ["batch", "seq"]), "may use batch and context only"),
        (put("values.2.name", "y"), "two values are called 'y'"),
        (put("values.2.below", 3), '"below" is for integer inputs'),
        (put("values.2.zero", 3), "value 'x' has the unknown field 'zero'"),
        (put("values", {}), '"values" of the artifact must be a list'),
        (put("steps.0.kernel", "a b"), "names the kernel 'a b'"),
        (put("steps.0.args.0.value", 6), "names value 6 of 6 values"),
        (put("steps.0.args.0.value", -1), "names value -1 of 6"),
        (put("steps.0.args.0.value", True), "names value True"),
        (put("steps.0.args.0", 1), "argument 0 of step 0 is not an object"),
        (put("steps.0.args.0.stride", 1), "unknown field 'stride'"),
        (put("steps.0.args.0.offset", "pas"), "unknown symbol 'pas' .did you mean .past"),
        (put("steps.0.reads", [1]), "uses value 'input_ids' without listing it"),
        (put("steps.0.writes", [1, 2]), "writes to the weight 'table'"),
        (put("steps.0.writes", [0, 2]), "writes to the input 'input_ids'"),
        (put("steps.0.when", {"past": [1, 2]}), "depends on the size 'past'"),
        (put("steps.0.when", {"seq": [1]}), "needs ranges"),
        (put("steps.0.origin", 5), '"origin" of step 0 must be a text'),
        (put("steps.2.reads", [3, 4]), "'y' is read before any step writes it"),
        (put("steps.3", ...), "no step writes the output 'logits'"),
        (put("inputs", []), "the input value 'input_ids' is missing in inputs"),
        (put("inputs", ["input_ids", "input_ids"]), "two inputs are called"),
        (put("outputs", ["x"]), "outputs lists 'x', no output value"),
        (put("outputs", [["logits"]]), "outputs lists"),
        (put("context_length", 0), '"context_length" of the artifact must be an integer'),
        (put("context_length", ...), "a model with state needs context_length"),
        (put("generate.tokens", "table"), '"tokens" of generate must name an input'),
        (put("generate.logits", "x"), '"logits" of generate must name an output'),
        (put("generate.eos", [-1]), '"eos" of generate must be a list of token ids'),
        (put("generate.chunk", 0), '"chunk" of generate'),
        (put("generate.top_p", 2), '"top_p" of generate must be a number'),
        (put("files", {"../x": {"bytes": 1, "sha256": "0" * 64}}), "'../x' cannot be a file"),
        (put("files", {"/etc/x": {"bytes": 1, "sha256": "0" * 64}}), "cannot be a file"),
        (put("files", {"manifest.json": {"bytes": 1, "sha256": "0" * 64}}), "cannot be a file"),
        (put("files", {"x": {"bytes": -1, "sha256": "0" * 64}}), '"bytes" of file'),
        (put("files", {"x": {"bytes": 1, "sha256": "0"}}), "64 hexadecimal digits"),
        (put("target.features", ["AVX 2"]), "'AVX 2' cannot be a CPU feature"),
        (put("tokenizer", 1), '"tokenizer" of the artifact must be true or false'),
        (put("steps.0", {"torch": "aten::add.Tensor", "args": [[[[[[1]]]]]], "reads": [],
                         "writes": []}), "nested too deeply"),
        (put("steps.0", {"torch": "os::system", "args": [], "reads": [], "writes": []}),
         "names the torch operator"),
        (put("steps.0", {"torch": "aten::add", "args": [{"value": 0}], "reads": [], "writes": []}),
         "without listing it in reads"),
        (put("steps.0", {"torch": "aten::add", "args": [{"eval": 0}], "reads": [], "writes": []}),
         'has no "dtype"'),
    ],
)  # fmt: skip
def test_each_fault_gets_one_clear_sentence(change: Any, message: str) -> None:
    changed = content()
    change(changed)
    with pytest.raises(ArtifactError, match=message) as caught:
        Manifest.parse(json.dumps(changed).encode())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def paths_of(thing: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the path of everything in a JSON value."""
    children: list[tuple[Any, Any]] = []
    if isinstance(thing, dict):
        children = list(thing.items())
    elif isinstance(thing, list):
        children = list(enumerate(thing))
    return [at] + [path for key, child in children for path in paths_of(child, (*at, key))]


VALID = content()
PATHS = [path for path in paths_of(VALID) if path]
JUNK = [
    None,
    True,
    -1,
    0,
    7,
    10**30,
    1.5,
    "",
    "x",
    "past",
    "seq",
    [],
    [1],
    {},
    {"value": 3},
    ["seq"],
]


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(PATHS), st.sampled_from(JUNK))
def test_any_changed_field_is_read_or_refused(path: tuple[Any, ...], junk: Any) -> None:
    changed = deepcopy(VALID)
    here = changed
    for part in path[:-1]:
        here = here[part]
    here[path[-1]] = junk
    with suppress(ArtifactError):
        Manifest.parse(json.dumps(changed).encode())


def test_expressions_compute_integers() -> None:
    symbols = {"batch": 2, "seq": 7, "context": 64}
    for text, expected in {
        "batch * seq": 14,
        "(context + 15) // 16": 4,
        "-seq + 10": 3,
        "seq**2 - 1": 48,
        "2*(batch + 3*seq)": 46,
        " 5 ": 5,
    }.items():
        assert parse_expression(text)(symbols) == expected
    assert parse_expression(5)({}) == 5
    assert parse_expression("seq").is_symbol
    assert not parse_expression("seq + 1").is_symbol
    with pytest.raises(ArtifactError, match="divides by zero"):
        parse_expression("seq // (batch - 2)")(symbols)
    with pytest.raises(ArtifactError, match="out of range"):
        parse_expression("seq * 4611686018427387900")(symbols)
    with pytest.raises(ArtifactError, match="gives no size 'past'"):
        parse_expression("past + 1")(symbols)


@pytest.mark.parametrize(
    "text",
    ["", "seq.x", "f(seq)", "seq[0]", "1.5", "'a'", "seq / 2", "seq << 2", "seq ** seq", "2 ** 99",
     "a if b else c", "lambda: 1", "__import__('os')", "seq +", "1" * 500, "(" * 300, "True",
     "seq = 1", "+".join(["1"] * 150), "séq", "9" * 40],
)  # fmt: skip
def test_nothing_else_is_an_expression(text: str) -> None:
    with pytest.raises(ArtifactError, match="is not an integer expression"):
        parse_expression(text)


@given(st.text(max_size=40))
def test_any_text_is_an_expression_or_refused(text: str) -> None:
    with suppress(ArtifactError):
        parse_expression(text)


def test_torch_steps_run_and_are_checked(tmp_path: Path) -> None:
    """The toy model with its `embed` and its `head` on torch."""
    manifest = toy.language_manifest()
    embed = TorchStep("aten::embedding", ({"value": 1}, {"value": 0}), (1, 0), (2,))
    last = TorchStep(
        "aten::slice.Tensor", ({"value": 4}, 1, {"symbol": "seq - keep"}, None), (4,), (6,)
    )
    head = TorchStep(
        "aten::linear", ({"value": 6}, {"value": 1}, None), (6, 1), (5,), origin="toy.head"
    )
    changed = toy.language_manifest(
        steps=(embed, *manifest.steps[1:3], last, head),
        values=(*manifest.values, Value("last", "f32", ("batch", "keep", 12), "scratch")),
    )
    artifact = load(toy.write_artifact(tmp_path / "a", changed))
    ids = [3, 1, 4, 1, 5]
    np.testing.assert_allclose(artifact(ids), toy.expected_logits(ids), rtol=1e-4, atol=1e-5)
    kernels = {row.kernel for row in artifact.profile(ids, new_tokens=1).rows}
    assert kernels == {
        "aten::embedding", "append", "mix", "aten::slice.Tensor", "aten::linear"
    }  # fmt: skip
    assert artifact.generate(ids, 9) == toy.expected_tokens(ids, 9)

    for step, message in (
        (TorchStep("aten::nope", (), (4,), (5,)), "has no operator aten::nope"),
        (TorchStep("aten::from_file", ("x",), (4,), (5,)), "may not call aten::from_file"),
        (TorchStep("aten::add_.Tensor", ({"value": 4}, 1), (4,), (5,)), "arguments in place"),
        (TorchStep("aten::relu", ({"value": 4}, 1), (4,), (5,)), "does not take these"),
        (TorchStep("aten::relu", ({"value": 4},), (4,), (5,)), "gave torch.float32.* for value"),
        (TorchStep("aten::mm", ({"value": 4}, {"value": 4}), (4,), (5,)), "aten::mm failed:"),
    ):
        broken = toy.language_manifest(steps=(*manifest.steps[:3], step))
        with pytest.raises(ArtifactError, match=message):
            load(toy.write_artifact(tmp_path / "b", broken))(ids)


def gpu_content() -> dict[str, Any]:
    """Return the manifest of the toy as a GPU artifact."""
    parsed: dict[str, Any] = json.loads(cuda.language_manifest().to_json())
    return parsed


def test_launches_are_written_and_read() -> None:
    manifest = cuda.language_manifest()
    assert Manifest.parse(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("code.embed", ...), "step 0 calls the kernel 'embed', not in code"),
        (put("code.embed.warps", 64), '"warps" of kernel .embed. must be an integer from 1 to 32'),
        (put("code.embed.parameters", ["pointer"]), "step 0 passes 6 arguments; embed takes 1"),
        (put("code.embed.parameters.0", "i32"), "argument 0 of step 0 is no i32, which embed"),
        (put("code.embed.parameters.3", "pointer"), "argument 3 of step 0 is no pointer"),
        (put("code.append.parameters.2", "i32"), "argument 2 of step 1 is no i32"),
        (put("code.embed.parameters.0", "f32"), "must be of pointer, i32, i64"),
        (put("steps.0.args.5.symbol", 1), "step 0 must pass 0 last"),
        (put("steps.0.late", [9]), "names value 9 of 6 values"),
        (put("code.embed.overlaps", 1), "must be true or false"),
        (put("code.embed.function", "a b"), "must be the name of a function"),
        (put("code.embed.binaries.0.file", "../x"), "must be the name of a file"),
        (put("code.embed.binaries.0.architecture", "sm_x"), "must be an architecture"),
        (put("code.embed.binaries.0.shared", -1), '"shared" of a binary of kernel .embed. must be'),
        (put("steps.0.grid", ...), "step 0 .embed. has no grid"),
        (put("steps.0.grid", [1]), "must have three sizes"),
        (put("steps.0.grid.0", "past"), 'the grid of step 0 may not use "past"'),
        (put("steps.0.grid.0", "lines"), "unknown symbol 'lines'"),
        (put("golden.0.steps", [9]), "numbers of the 4 steps"),
        (put("golden.0.steps", []), "numbers of the 4 steps"),
        (put("golden.0.sizes.seq", "3"), "gives 'seq' no size"),
        (put("golden.0.inputs", {"x": "ids"}), "names value -1 of 6 values"),
        (put("golden.0.result", 77), "names value 77 of 6 values"),
        (put("golden.0.tolerance", 2), "must be a number from 0 to 1"),
    ],
)  # fmt: skip
def test_launches_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    hostile = gpu_content()
    change(hostile)
    with pytest.raises(ArtifactError, match=message):
        Manifest.parse(json.dumps(hostile).encode())


def test_a_launch_may_depend_on_products_of_sizes() -> None:
    first, *rest = cuda.language_manifest().steps
    steps = (replace(first, when={"batch * seq": (1, 4)}), *rest)
    manifest = cuda.language_manifest(steps=steps)
    assert Manifest.parse(manifest.to_json()) == manifest
    hostile = json.loads(manifest.to_json())
    hostile["steps"][0]["when"] = {"7": [1, 2]}
    with pytest.raises(ArtifactError, match="depends on the size '7'"):
        Manifest.parse(json.dumps(hostile).encode())
