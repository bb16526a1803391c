"""What every test can count on: fixed seeds and threads, no hub, reasoned skips, golden files."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: tests never ask a hub

import torch
from hypothesis import settings

from real_model import CALIBRATION, EVALUATION, MODEL
from tests.needs import find_lack

GOLDEN = Path(__file__).parent / "golden"

# Compiling a kernel inside a property takes as long as it takes; in CI a failure must come again.
settings.register_profile("developer", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "developer")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the golden files that differ"
    )
    parser.addoption(
        "--without-fast-rules", action="store_true", help="multiply every weight element by element"
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # a sum split among threads rounds differently; -n 2 fills two cores
    if config.getoption("--without-fast-rules"):
        from qc.backends.tvm.linear import rule

        rule.FAST_RULES = ()  # for good: this process runs nothing but tests


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.config.getoption("--without-fast-rules") and item.get_closest_marker("fast_rules"):
        pytest.skip("needs the fast kernel rules, which --without-fast-rules takes away")
    for mark in item.iter_markers("needs"):
        for fact in mark.args:
            reason = find_lack(fact)
            if reason:
                pytest.skip(f"needs {fact}: {reason}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def offgrid_model() -> Path:
    """Return the Hugging Face folder of the real model."""
    return _written_by_make(MODEL)


@pytest.fixture(scope="session")
def calibration_text() -> Path:
    """Return the text to calibrate on, utf-8."""
    return _written_by_make(CALIBRATION)


@pytest.fixture(scope="session")
def evaluation_text() -> Path:
    """Return the text to measure perplexity on, utf-8."""
    return _written_by_make(EVALUATION)


def _written_by_make(path: Path) -> Path:
    reason = find_lack("model")
    if reason:
        pytest.skip(f"needs model: {reason}")
    return path


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Return `check(name, text)`: text equals tests/golden/<name>; --update-golden writes it."""

    def check(name: str, text: str) -> None:
        file = GOLDEN / name
        if request.config.getoption("--update-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        assert file.is_file(), f"no tests/golden/{name}: run pytest --update-golden, read, commit"
        assert text == file.read_text(encoding="utf-8"), f"tests/golden/{name} differs"

    return check
