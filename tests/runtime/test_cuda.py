"""The CUDA executor on a stub driver: what it launches, copies, records, frees and refuses."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from qc.cli import main
from qc.errors import ArtifactError, ContextLengthError, UnsupportedError
from qc.runtime import load
from qc.runtime.cuda.executor import CudaProgram
from qc.runtime.cuda.order import Access, dependencies, late_starts
from qc.runtime.sampling import Sampling, share
from tests.runtime import cuda, toy


@pytest.fixture(autouse=True)
def _stub_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stub in the place of the driver."""
    monkeypatch.setattr(CudaProgram, "library_name", str(cuda.stub_driver()))
    cuda.stub().stub_set_device(90, 232448)
    cuda.stub().stub_reset()


def test_logits_of_prompts_and_steps(tmp_path: Path) -> None:
    artifact = load(cuda.write_artifact(tmp_path / "toy.qc"))
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]  # two chunks of a prompt
    np.testing.assert_allclose(artifact(ids), toy.expected_logits(ids), rtol=1e-5, atol=1e-5)
    session = artifact.session()
    found = session.prefill(ids[:4])
    np.testing.assert_allclose(found[0], toy.expected_logits(ids[:4])[-1], rtol=1e-5, atol=1e-5)
    for length in range(5, 9):
        found = session.step(ids[length - 1])
        expected = toy.expected_logits(ids[:length])[-1]
        np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)


def test_generation_across_growing_state(tmp_path: Path) -> None:
    artifact = load(cuda.write_artifact(tmp_path / "toy.qc"))
    assert artifact.generate([1, 2, 3], 150) == toy.expected_tokens([1, 2, 3], 150)
    session = artifact.session(batch=2)  # nothing reserved: the state grows as tokens come
    session.prefill([[1, 2], [7, 8]])
    rows = [[1, 2], [7, 8]]
    for step in range(140):
        found = session.step([step % 41, (step * 3) % 41])
        rows = [[*rows[0], step % 41], [*rows[1], (step * 3) % 41]]
    expected = np.stack([toy.expected_logits(row)[-1] for row in rows])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ContextLengthError):
        artifact.generate([1] * 10, 500)


def test_calls_that_come_again_are_one_graph(tmp_path: Path) -> None:
    stub = cuda.stub()
    artifact = load(cuda.write_artifact(tmp_path / "toy.qc"))
    session = artifact.session()
    session.reserve(64)
    session.prefill([1, 2, 3])
    stub.stub_reset()
    for step in range(5):
        session.step(step)
    assert stub.stub_graph_launches() == 4  # the first call is run as it is
    assert stub.stub_launches() == 20
    assert stub.stub_log().decode().splitlines()[:4] == [
        "embed 1x1x1", "append 1x1x1", "mix 1x1x1", "head 1x1x1",
    ]  # fmt: skip


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_tokens_are_chosen_in_the_graph_of_a_step(tmp_path: Path, architecture: str) -> None:
    stub = cuda.stub()
    stub.stub_set_device(int(architecture[3:]), 232448)
    manifest = cuda.choosing_manifest(code=cuda.code((architecture,)))
    artifact = load(cuda.write_artifact(tmp_path / "toy.qc", manifest))
    stub.stub_reset()
    assert artifact.generate([1, 2, 3], 20) == toy.expected_tokens([1, 2, 3], 20)
    assert stub.stub_graph_launches() == 18  # the first step is run as it is
    assert stub.stub_launches() == 4 + 19 * 6  # the prompt's logits come here
    log = stub.stub_log().decode().splitlines()
    assert log[8:10] == ["best 1x1x1", "next 1x1x1"]


def test_a_step_may_choose_or_give_logits(tmp_path: Path) -> None:
    artifact = load(cuda.write_artifact(tmp_path / "toy.qc", cuda.choosing_manifest()))
    ids, random = [3, 1, 4], np.random.default_rng(0)
    session = artifact.session()
    session.prefill(ids)
    for turn in range(9):
        ids.append(turn * 5 % 41)
        if turn % 2:
            found = int(session.step(ids[-1])[0].argmax())
        else:
            (found,) = session.choose([ids[-1]], Sampling(), random, [True], 0)
        assert found == int(toy.expected_logits(ids)[-1].argmax())


def test_what_is_asked_for_reaches_the_kernel(tmp_path: Path) -> None:
    """Row after row draws from one generator, as it does where the logits come here."""
    artifact = load(cuda.write_artifact(tmp_path / "toy.qc", cuda.choosing_manifest()))
    session = artifact.session(batch=3)
    session.prefill([[1], [2], [3]])
    random, again = np.random.default_rng(7), np.random.default_rng(7)
    for _ in range(3):
        sampling = Sampling(0.5, top_k=9, top_p=0.25)
        found = session.choose([1, 2, 3], sampling, random, [True, False, True], 40)
        shares = [share(again.random()) for _ in range(2)]
        expected = [(9 + 2 + (each >> 26)) % 41 for each in shares]
        assert found == [expected[0], 40, expected[1]]


def test_logits_that_are_no_numbers_are_an_error_on_the_gpu_too(tmp_path: Path) -> None:
    folder = cuda.write_artifact(tmp_path / "toy.qc", cuda.choosing_manifest())
    artifact = load(folder)
    artifact._program.weights[1][...] = np.nan
    session = artifact.session()
    session.prefill([1])
    with pytest.raises(ArtifactError, match="NaN"):
        session.choose([1], Sampling(), np.random.default_rng(0), [True], 0)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_launches_of_a_graph_begin_early_where_the_gpu_can(
    tmp_path: Path, architecture: str
) -> None:
    stub = cuda.stub()
    stub.stub_set_device(int(architecture[3:]), 232448)
    manifest = cuda.language_manifest(code=cuda.code((architecture,)))
    session = load(cuda.write_artifact(tmp_path / "toy.qc", manifest)).session()
    session.reserve(64)
    session.prefill([1, 2, 3])
    stub.stub_reset()
    for step in range(4):
        found = session.step(step)
        expected = toy.expected_logits([1, 2, 3, *range(step + 1)])[-1]
        np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)
    early = architecture == "sm_90"
    assert stub.stub_launches_beside() == (3 if early else 0)  # the first has none in front
    assert stub.stub_late_launches() == 0  # each reads what the one in front wrote


def test_launches_that_share_nothing_wait_late() -> None:
    x, q, k, v, y = ((at, at + 64) for at in range(0, 320, 64))
    order = [
        Access((), (x,)),
        Access((x,), (q,)),  # waits: it reads x
        Access((x,), (k,)),  # beside the last one
        Access((x,), (), late_writes=(v,)),
        Access((x,), (), late_reads=(q, k, v), late_writes=(y,)),  # reads them once it has waited
        Access((y,), (x,)),
        Access((), (q,)),  # whatever read q has ended: the one in front has waited
        Access((), (y,)),  # read by one that may still run
    ]
    assert late_starts(order) == [False, False, True, True, True, False, True, False]
    assert late_starts(order[:1] * 2) == [False, False]


def test_launches_wait_for_the_memory_that_they_share() -> None:
    left, right, scratch = (0, 64), (64, 128), (256, 320)
    order = [
        Access((), (left,)),
        Access((left,), (right,)),
        Access((left,), (scratch,)),  # beside the one before: both read
        Access((), ((32, 80),)),  # over both of what was read and written
        Access((right, scratch), ()),
        Access((), (left,)),
    ]
    assert dependencies(order) == [set(), {0}, {0}, {1, 2}, {1, 2, 3}, {1, 2, 3}]


def test_profile_names_every_kernel(tmp_path: Path) -> None:
    profile = load(cuda.write_artifact(tmp_path / "toy.qc")).profile(new_tokens=3)
    assert {row.kernel for row in profile.rows} == set(cuda.PARAMETERS)
    assert profile.total("decode") == pytest.approx(6.0)


def test_memory_is_given_back(tmp_path: Path) -> None:
    stub = cuda.stub()
    gc.collect()
    before = stub.stub_live_blocks()
    artifact = load(cuda.write_artifact(tmp_path / "toy.qc"))
    artifact.generate([1, 2, 3], 5)
    assert stub.stub_live_blocks() > before
    del artifact
    gc.collect()
    assert stub.stub_live_blocks() == before


def test_verify_says_which_kernel_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = cuda.write_artifact(tmp_path / "right.qc")
    assert not load(right).verify().wrong
    assert main(["verify", str(right)]) == 0
    assert "all 1 checks are right" in capsys.readouterr().out
    wrong = cuda.write_artifact(tmp_path / "wrong.qc", wrong=True)
    assert main(["verify", str(wrong)]) == 1
    assert "wrong: embed (batch 1, seq 3), at toy.embed" in capsys.readouterr().out
    with pytest.raises(UnsupportedError, match="holds no golden outputs"):
        load(toy.write_artifact(tmp_path / "cpu.qc")).verify()


@pytest.mark.parametrize(
    ("built", "here", "chosen"),
    [
        (("sm_80", "sm_90"), 90, "sm_90"),
        (("sm_80", "sm_86"), 89, "sm_86"),
        (("sm_80",), 86, "sm_80"),
        (("sm_80", "ptx_80"), 120, "ptx_80"),
        (("sm_80", "ptx_80", "sm_90"), 90, "sm_90"),
        (("sm_100",), 103, None),  # code for 10.0 is for 10.0 alone
        (("sm_90",), 80, None),
        (("ptx_80",), 75, None),
    ],
)
def test_the_code_that_fits_the_gpu(
    tmp_path: Path, built: tuple[str, ...], here: int, chosen: str | None
) -> None:
    cuda.stub().stub_set_device(here, 101_376)
    manifest = cuda.language_manifest(code=cuda.code(built))
    path = cuda.write_artifact(tmp_path / "toy.qc", manifest)
    for each in built:  # only what is chosen can be read
        if each != chosen:
            for name in cuda.PARAMETERS:
                file = path / "code" / each / f"{name}.cubin"
                file.write_bytes(bytes(file.stat().st_size))
    artifact = load(path)
    if chosen is None:
        with pytest.raises(
            ArtifactError, match=f"is sm_{here}: compile the model for cuda:sm_{here}"
        ):
            artifact([1, 2])
    else:
        np.testing.assert_allclose(artifact([1, 2]), toy.expected_logits([1, 2]), rtol=1e-5)


def test_shared_memory_is_asked_for_and_too_much_is_refused(tmp_path: Path) -> None:
    manifest = cuda.language_manifest(code=cuda.code(shared=100_000))
    artifact = load(cuda.write_artifact(tmp_path / "toy.qc", manifest))
    np.testing.assert_allclose(artifact([1, 2]), toy.expected_logits([1, 2]), rtol=1e-5)
    cuda.stub().stub_set_device(90, 64_000)
    with pytest.raises(ArtifactError, match="was compiled for sm_90"):
        load(tmp_path / "toy.qc")([1, 2])


def test_without_a_gpu_one_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cuda.write_artifact(tmp_path / "toy.qc")
    monkeypatch.setenv("STUB_NO_GPU", "1")
    artifact = load(path)  # looking at it needs no GPU
    assert "embed" in artifact.plan
    with pytest.raises(
        ArtifactError, match=r"this machine has none \(its NVIDIA driver sees no GPU"
    ):
        artifact([1, 2])
    monkeypatch.setattr(CudaProgram, "library_name", str(tmp_path / "missing.so"))
    with pytest.raises(ArtifactError, match=r"no NVIDIA driver is installed\): load it where"):
        load(path)([1, 2])
    assert main(["verify", str(path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_an_image_that_is_corrupt_is_refused(tmp_path: Path) -> None:
    path = cuda.write_artifact(tmp_path / "toy.qc")
    (path / "code/sm_90/mix.cubin").write_bytes(b"what is this")
    (path / "code/sm_90/mix.cubin").write_bytes(b"BAD  mix")
    with pytest.raises(ArtifactError, match="the GPU refused cuModuleLoadData: stub error"):
        load(path)([1, 2])
