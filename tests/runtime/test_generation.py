"""The toy language model gives what numpy gives, by every way of calling it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qc.errors import ArtifactError, ContextLengthError, InputError, UnsupportedError
from qc.runtime import Artifact, load
from qc.runtime.manifest import Generate, KernelStep, ValueArg
from qc.runtime.sampling import Sampling
from tests.runtime import toy

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 100, toy.CONTEXT])
def test_a_call_gives_the_logits_of_all_tokens(artifact: Artifact, length: int) -> None:
    ids = np.random.default_rng(length).integers(0, toy.VOCABULARY, length)
    logits = artifact(ids)
    assert logits.shape == (length, toy.VOCABULARY)
    np.testing.assert_allclose(logits, toy.expected_logits(ids), rtol=1e-4, atol=1e-5)


def test_a_batch_is_its_rows(artifact: Artifact) -> None:
    rows = np.random.default_rng(1).integers(0, toy.VOCABULARY, (3, 21))
    logits = artifact(rows)
    assert logits.shape == (3, 21, toy.VOCABULARY)
    for row, found in zip(rows, logits, strict=True):
        np.testing.assert_allclose(found, toy.expected_logits(row), rtol=1e-4, atol=1e-5)


def test_greedy_generation_takes_the_most_likely_token(artifact: Artifact) -> None:
    expected = toy.expected_tokens(PROMPT, 20)
    assert artifact.generate(PROMPT, 20) == expected
    assert artifact.generate(PROMPT, 20, chunk=3) == expected
    assert list(artifact.stream(PROMPT, 20)) == expected[len(PROMPT) :]
    assert artifact.generate(PROMPT, 0) == PROMPT


def test_what_comes_in_comes_out(artifact: Artifact) -> None:
    import torch

    expected = toy.expected_tokens(PROMPT, 5)
    assert artifact.generate([PROMPT], 5) == [expected]
    found = artifact.generate(np.array(PROMPT, np.int32), 5)
    assert isinstance(found, np.ndarray)
    assert found.tolist() == expected
    tensor = artifact.generate(torch.tensor([PROMPT]), 5)
    assert isinstance(tensor, torch.Tensor)
    assert tensor.tolist() == [expected]
    assert isinstance(artifact(torch.tensor(PROMPT)), torch.Tensor)
    assert isinstance(artifact(input_ids=PROMPT), np.ndarray)


def test_rows_of_unequal_length_run_one_after_another(artifact: Artifact) -> None:
    rows = [PROMPT, PROMPT[:3], [7]]
    assert artifact.generate(rows, 6) == [toy.expected_tokens(row, 6) for row in rows]


def test_a_row_ends_at_a_stop_token_and_is_filled_up(tmp_path: Path) -> None:
    rows = [PROMPT, [7, 8, 9, 10, 11, 12, 13, 14]]
    free = [toy.expected_tokens(row, 12) for row in rows]
    stop = free[0][len(PROMPT) + 2]
    first = free[0].index(stop, len(PROMPT)) + 1
    manifest = toy.language_manifest(generate=Generate("input_ids", "logits", eos=(stop,), pad=40))
    artifact = load(toy.write_artifact(tmp_path / "m", manifest))
    assert artifact.generate(PROMPT, 12) == free[0][:first]
    found = artifact.generate(rows, 12)
    assert found[0][:first] == free[0][:first]
    assert set(found[0][first:]) <= {40}
    if stop not in free[1][len(PROMPT) :]:
        assert found[1] == free[1]


def test_sessions_are_independent_and_can_be_rewound(artifact: Artifact) -> None:
    one, two = artifact.session(), artifact.session()
    one.prefill(PROMPT)
    two.prefill([7])
    a, b = one.step(5), two.step(8)
    np.testing.assert_allclose(a[0], toy.expected_logits([*PROMPT, 5])[-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(b[0], toy.expected_logits([7, 8])[-1], rtol=1e-4, atol=1e-5)
    one.rewind(3)
    assert one.past == 3
    found = one.prefill([30, 31])
    expected = toy.expected_logits([*PROMPT[:3], 30, 31])[-1]
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="cannot rewind to 9"):
        one.rewind(9)


def test_the_state_keeps_its_content_when_it_grows(artifact: Artifact) -> None:
    ids = np.random.default_rng(2).integers(0, toy.VOCABULARY, toy.CONTEXT).tolist()
    session = artifact.session()
    session.prefill(ids[:60])
    capacities = {session.capacity}
    for at in range(60, toy.CONTEXT):
        logits = session.step(ids[at])
        capacities.add(session.capacity)
    assert sorted(capacities) == [64, 128, 256, 320]
    np.testing.assert_allclose(logits[0], toy.expected_logits(ids)[-1], rtol=1e-3, atol=1e-4)
    with pytest.raises(ContextLengthError, match=r"token 301 is one too many.* holds 300"):
        session.step(1)


def test_too_many_tokens_are_refused_before_work(artifact: Artifact) -> None:
    with pytest.raises(ContextLengthError, match=r"8 tokens of prompt and 293 new .* holds 300"):
        artifact.generate(PROMPT, 293)
    with pytest.raises(ContextLengthError, match=r"8 tokens of prompt and 293 new .* holds 300"):
        artifact.stream(PROMPT, 293)
    with pytest.raises(ContextLengthError, match=r"301 tokens .* holds 300"):
        artifact([1] * 301)
    with pytest.raises(ContextLengthError, match="holds 300"):
        artifact.generate([1] * 301)
    assert len(artifact.generate([1] * 299)) == 300


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([41], "holds 41; it takes 0 to 40"),
        ([-1], "holds -1"),
        ([1.5], "takes integers, not float64"),
        (["a"], "takes integers"),
        ([], "takes integers|at least one"),
        (np.zeros((1, 2, 3), np.int64), r"must have shape \[batch, seq\]|at least one"),
        (np.zeros((1, 0), np.int64), r"must have shape \[batch, seq\]|at least one"),
        ([[1, 2], [3]], "cannot be read"),
    ],
)
def test_bad_ids_get_one_clear_sentence(artifact: Artifact, ids: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        artifact(ids)
    if not (isinstance(ids, list) and ids and isinstance(ids[0], list)):
        with pytest.raises(InputError, match=message):
            artifact.generate(ids)


def test_inputs_are_matched_by_name(artifact: Artifact) -> None:
    with pytest.raises(InputError, match=r"'input_id' is unknown.*did you mean \"input_ids\""):
        artifact(input_id=[1])
    with pytest.raises(InputError, match="'input_ids' is missing"):
        artifact()
    with pytest.raises(InputError, match="came twice"):
        artifact([1], input_ids=[1])
    with pytest.raises(InputError, match="2 inputs came"):
        artifact([1], [2])


def test_sampling_is_repeatable_and_follows_the_distribution(artifact: Artifact) -> None:
    first = artifact.generate(PROMPT, 30, temperature=1.5, seed=4)
    assert artifact.generate(PROMPT, 30, temperature=1.5, seed=4) == first
    assert artifact.generate(PROMPT, 30, temperature=1.5, seed=5) != first
    assert artifact.generate(PROMPT, 30, temperature=2.0, top_k=1) == toy.expected_tokens(
        PROMPT, 30
    )

    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    random = np.random.default_rng(0)

    def shares(sampling: Sampling) -> list[float]:
        drawn = [sampling.choose(logits, random) for _ in range(4000)]
        return [drawn.count(token) / 4000 for token in range(4)]

    assert shares(Sampling(1.0)) == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.03)
    assert shares(Sampling(1.0, top_k=2)) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.03)
    assert shares(Sampling(1.0, top_p=0.8)) == pytest.approx([0.56, 0.28, 0.17, 0], abs=0.03)
    assert shares(Sampling(1.0, top_p=0.5))[0] == 1
    assert shares(Sampling(0.5))[0] == pytest.approx(0.25 / 0.345, abs=0.03)
    with pytest.raises(InputError, match="temperature"):
        artifact.generate(PROMPT, 1, temperature=-1)
    with pytest.raises(ArtifactError, match="NaN"):
        Sampling().choose(np.array([1, np.nan], np.float32), random)


def test_a_decode_step_costs_little_python(artifact: Artifact) -> None:
    """About 10 us a token; the bound is loose because the machine is shared."""
    from time import perf_counter

    artifact.set_threads(1)
    session = artifact.session()
    session.prefill([1])
    binding = session._executor.bind({"batch": 1, "seq": 1, "keep": 1, "context": 64})
    times = []
    for _ in range(200):
        session.rewind(1)
        start = perf_counter()
        session.advance([1])
        times.append(perf_counter() - start)
    artifact.set_threads(None)
    assert binding is session._executor.bind({"batch": 1, "seq": 1, "keep": 1, "context": 64})
    assert min(times) < 100e-6


def test_a_model_without_generation_says_so(tmp_path: Path) -> None:
    manifest = toy.language_manifest()
    stateless = tuple(
        replace(v, kind="scratch") if v.kind == "state" else v for v in manifest.values
    )
    steps = list(manifest.steps)
    steps[1] = replace(steps[1], reads=(2,))
    artifact = load(
        toy.write_artifact(
            tmp_path / "m",
            replace(manifest, values=stateless, steps=tuple(steps), generate=None),
        )
    )
    with pytest.raises(UnsupportedError, match="does not generate"):
        artifact.generate([1])


def test_steps_may_depend_on_sizes_and_pointers_on_the_past(tmp_path: Path) -> None:
    """One token is put into the state by a kernel that is given the place; more by `append`."""
    manifest = toy.language_manifest()
    embed, append, mix, head = manifest.steps
    assert isinstance(append, KernelStep)
    place = ValueArg(3, (toy.WIDTH,), f"past * {toy.WIDTH}")
    one = KernelStep("copy_row", (ValueArg(2), place), (2, 3), (3,), when={"seq": (1, 1)})
    more = replace(append, when={"seq": (2, None)})
    changed = replace(manifest, steps=(embed, one, more, mix, head))
    artifact = load(toy.write_artifact(tmp_path / "m", changed))
    assert artifact.generate(PROMPT, 90) == toy.expected_tokens(PROMPT, 90)
    decode = {row.kernel for row in artifact.profile(PROMPT).rows if row.phase == "decode"}
    assert decode == {"embed", "copy_row", "mix", "head"}
    assert "# toy.append; if seq in 2.." in artifact.plan

    outside = replace(place, offset=f"(past + 64) * {toy.WIDTH}")
    broken = replace(manifest, steps=(embed, replace(one, args=(ValueArg(2), outside)), mix, head))
    with pytest.raises(ArtifactError, match=r"the offset .* is 768, room is for 756"):
        load(toy.write_artifact(tmp_path / "n", broken)).session().prefill([1])


def test_nothing_large_is_imported() -> None:
    """qc.runtime works where only numpy is, and where the rest of qc is not."""
    import subprocess

    root = Path(toy.NATIVE).parent.parent
    code = f"""
import sys, types
blocked = ("torch", "tvm", "tvm_ffi", "transformers", "safetensors", "gguf", "networkx", "triton",
           "tokenizers", "jinja2", "qc.ir", "qc.passes", "qc.backends", "qc.frontends")
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in blocked or name.split(".")[0] in blocked:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Refuse())
qc = types.ModuleType("qc"); qc.__path__ = [{str(root)!r}]; sys.modules["qc"] = qc
import qc.runtime
artifact = qc.runtime.load(sys.argv[1])
print(artifact.generate({PROMPT}, 5))
"""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = toy.write_artifact(Path(folder) / "m")
        out = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
        )
    assert out.stderr == ""
    assert out.stdout.strip() == str(toy.expected_tokens(PROMPT, 5))
