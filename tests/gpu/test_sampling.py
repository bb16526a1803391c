"""Tokens that a GPU chooses are those that are chosen here from its logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import qc
from qc.backends.triton.compile import compile_launch
from qc.backends.triton.sampling import sampler_launches
from qc.runtime import Artifact
from qc.runtime.cuda.driver import find_driver
from qc.runtime.cuda.sampling import Sampler
from qc.runtime.sampling import Sampling
from tests.backends.triton.sampled import SAMPLED, Sampled
from tests.needs import needs
from tests.tiny_llama import llama_folder

pytestmark = [needs("cuda"), pytest.mark.slow]

LARGE = (
    Sampled(128256, Sampling()),
    Sampled(128256, Sampling(1.0)),
    Sampled(49152, Sampling(0.8, top_k=50, top_p=0.9)),
    Sampled(128256, Sampling(1.2, top_p=0.99)),
    Sampled(128256, Sampling(1.0, top_k=1000), coarse=True),
)


@pytest.mark.parametrize("case", [*SAMPLED, *LARGE], ids=str)
def test_kernels_choose_the_same_tokens(case: Sampled) -> None:
    driver, rows = find_driver(), 7
    logits = case.logits(rows, np.random.default_rng(0))
    held = torch.from_numpy(logits).cuda()
    torch.cuda.synchronize()
    functions = {}
    for name, launch in zip(("first", "second"), sampler_launches(case.vocabulary), strict=True):
        cubin = compile_launch(launch, driver.capability)
        threads = 32 * cubin.num_warps
        functions[name] = driver.load_function(
            cubin.binary, cubin.name, threads, cubin.shared_bytes
        )
    names = tuple(functions)
    sampler = Sampler(driver, functions, names, held.data_ptr(), rows, case.vocabulary)
    ours, theirs, alive = np.random.default_rng(1), np.random.default_rng(1), [True] * rows
    for _ in range(20):
        sampler.settings[...] = case.sampling.settings(ours, alive)
        sampler.taken.upload()
        for launch in sampler.launches:
            launch.enqueue(driver)
        sampler.given.download()
        driver.synchronize()
        expected = case.sampling.choose_rows(logits, theirs, alive, 0)
        assert sampler.chosen.tolist() == expected


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    place = tmp_path_factory.mktemp("sampling")
    return qc.compile(llama_folder(place), "cuda-w4a16", output=place / "tiny.qc")


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.9), Sampling(1.0, 20), Sampling(1.5, 100, 0.8)], ids=str
)
def test_generation_chooses_as_from_its_logits(artifact: Artifact, sampling: Sampling) -> None:
    prompt, random = [[1, 5, 9, 30], [7, 7, 200, 3]], np.random.default_rng(11)
    found = artifact.generate(
        prompt, 24, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p,
        seed=11,
    )  # fmt: skip
    session, alive = artifact.session(batch=2), [True, True]
    chosen = sampling.choose_rows(session.prefill(prompt), random, alive, 0)
    rows = [[*line, token] for line, token in zip(prompt, chosen, strict=True)]
    for _ in range(23):
        chosen = sampling.choose_rows(session.advance(chosen), random, alive, 0)
        rows = [[*line, token] for line, token in zip(rows, chosen, strict=True)]
    assert found == rows or any(t in artifact.manifest.generate.eos for r in rows for t in r)


def test_the_kernels_are_verified(artifact: Artifact) -> None:
    found = artifact.verify()
    assert not found.wrong, str(found)
    assert any("next_token" in row.kernel for row in found.rows)
