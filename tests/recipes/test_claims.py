"""What the papers claim, decided from recorded results; `make test-claims` measures anew.

Recorded results are lines of benchmarks.campaign. What is measured anew takes 32 sequences to
calibrate on and 32 windows, more than 16,000 predicted tokens, and is kept under build/.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.campaign import Bench, Job, open_bench, read_results, run_all
from benchmarks.claims import (
    CAUSES,
    CLAIMS,
    CONFIGURATIONS,
    UNMEASURED,
    Claim,
    Verdict,
    decide,
    needs_data,
)
from qc.passes.recipes import PUBLISHED, RECIPES
from real_model import BUILD, MODEL
from tests.needs import needs

RECORDED = Path(__file__).parents[2] / "benchmarks" / "measured" / "claims.jsonl"
MEASURED = BUILD / "claims.jsonl"


def result(name: str, perplexity: float, seed: int = 0, bits: float = 3.0) -> dict[str, Any]:
    return {"name": name, "seed": seed, "perplexity": perplexity, "bits": {"blocks": bits}}


@functools.cache
def recorded() -> dict[str, Verdict]:
    return {each.claim.text: each for each in decide(read_results(RECORDED))}


def test_every_claim_of_a_recipe_is_decided_by_data() -> None:
    known = {(claim.recipe, claim.text) for claim in CLAIMS}
    for recipe in (*PUBLISHED, RECIPES["w3"]):
        assert recipe.claims
        assert {(recipe.name, text) for text in recipe.claims} <= known, recipe.name
    assert {claim.recipe for claim in CLAIMS} <= RECIPES.keys()
    assert {name for claim in CLAIMS for name in claim.names} <= CONFIGURATIONS.keys()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.recipe}: {claim.text}")
def test_what_was_recorded_agrees_or_has_a_cause(claim: Claim) -> None:
    found = recorded().get(claim.text)
    assert (found is None) == (claim.text in UNMEASURED)
    if found is None:
        pytest.skip("not recorded yet: make test-claims measures it")
    assert found.holds != (claim.text in CAUSES), str(found)


def test_an_order_must_hold_with_every_seed() -> None:
    claim = next(each for each in CLAIMS if each.order == ("gptq3", "rtn3"))
    lines = [result("gptq3", 3.0), result("rtn3", 4.0), result("gptq3", 5.0, seed=1)]
    agreeing = next(each for each in decide(lines[:2]) if each.claim is claim)
    assert agreeing.holds
    assert agreeing.figures == ((3.0, 4.0),)
    opposed = next(each for each in decide(lines) if each.claim is claim)
    assert not opposed.holds  # rounding looks at no data: what it gave with one seed counts for all
    assert opposed.figures == ((3.0, 4.0), (5.0, 4.0))
    assert "FAILS gptq" in str(opposed)


def test_ratios_and_bits_are_compared_too() -> None:
    names = {"rtn3": 9.0, "gptq3": 3.0, "rtn4": 3.0, "gptq4": 2.0, "spqr": 1.0, "spqr tau 0.1": 1.0}
    lines = [
        result(name, value, bits=4.0 + (name == "spqr tau 0.1")) for name, value in names.items()
    ]
    held = {each.claim.text: each for each in decide(lines)}
    gap = held["the gap between rtn and gptq is larger at 3 bits than at 4"]
    assert gap.holds
    assert gap.figures == ((-3.0, -1.5),)
    assert held["a smaller tau keeps more outliers"].figures == ((4.0, 5.0),)


def test_who_looks_at_data_is_known() -> None:
    assert needs_data("gptq3")
    assert needs_data("squeezellm3")
    assert not needs_data("rtn3")
    assert not needs_data("lorc3 rank 8")


@functools.cache
def bench() -> Bench:
    return replace(open_bench(str(MODEL), "auto"), samples=32, windows=32, deciding=0)


@needs("model")
@pytest.mark.slow
@pytest.mark.claims
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.recipe}: {claim.text}")
def test_claims_reproduce(claim: Claim) -> None:
    jobs = [Job(name, CONFIGURATIONS[name]) for name in claim.names]
    run_all(bench(), jobs, MEASURED, 1)
    found = next(each for each in decide(read_results(MEASURED)) if each.claim is claim)
    if not found.holds and claim.text in CAUSES:
        pytest.xfail(f"{CAUSES[claim.text]} {found}")
    assert found.holds, str(found)
