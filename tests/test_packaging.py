"""What may be imported from where, beyond the contracts that import-linter checks statically."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "qc").rglob("*.py"))

# Only these name operators of ATen: whoever else does depends on how torch spells them this year.
MAY_NAME_ATEN = (
    "qc/passes/prepare/",
    "qc/frontends/",
    "qc/backends/torch/",
    "qc/runtime/torch_step.py",  # runs the ATen calls that a plan carries
)

OPERATOR = re.compile(r"\baten(\.|::)\w")

EMPTY_NAMES = {"utils", "common", "helpers", "core", "base", "misc"}

BLOCK_IMPORTS = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in BLOCKED):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
"""

IMPORT_ALL_OF_RUNTIME = """
import importlib, pkgutil, qc.runtime
for module in pkgutil.walk_packages(qc.runtime.__path__, "qc.runtime."):
    importlib.import_module(module.name)
"""


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import qc", id="import"),
        pytest.param("import qc; [getattr(qc, name) for name in qc.__all__]", id="every-name"),
    ],
)
def test_importing_qc_loads_no_backend_and_no_transformers(code: str) -> None:
    loaded = run_python(f"{code}; import sys; print(*sys.modules)").split()
    assert {"triton", "tvm", "tvm_ffi", "transformers"}.isdisjoint(loaded)


def test_runtime_imports_where_nothing_of_the_compiler_is_installed() -> None:
    compiler = ["ir", "frontends", "passes", "backends", "stages", "compiler", "cli"]
    libraries = ["torch", "transformers", "tvm", "tvm_ffi", "triton", "networkx", "gguf"]
    blocked = [f"qc.{name}" for name in compiler] + libraries
    run_python(f"BLOCKED = {blocked}\n{BLOCK_IMPORTS}\n{IMPORT_ALL_OF_RUNTIME}")


def test_blocking_blocks() -> None:
    with pytest.raises(AssertionError, match=r"qc\.runtime is blocked"):
        run_python(f"BLOCKED = ['qc.runtime']\n{BLOCK_IMPORTS}\n{IMPORT_ALL_OF_RUNTIME}")


def find_aten_names(tree: ast.Module) -> Iterator[int]:
    """Yield the lines that name an operator of ATen: `ops.aten` or a string such as "aten.add".

    A docstring may: it is read by people.
    """
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr="aten"):
                yield node.lineno
            case ast.Constant(value=str(text)) if id(node) not in prose and OPERATOR.search(text):
                yield node.lineno


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("x = torch.ops.aten.linear.default", [1]),
        ('\nx = "aten.linear.default"', [2]),
        ('x = "aten::linear"', [1]),
        ('"""Like aten.linear."""', []),
        ('x = re.compile("aten::[a-z]+")', []),
    ],
)
def test_aten_names_are_found(code: str, lines: list[int]) -> None:
    assert list(find_aten_names(ast.parse(code))) == lines


def test_aten_names_stay_at_the_edges() -> None:
    found = [
        f"{name}:{line}"
        for name, file in ((file.relative_to(ROOT).as_posix(), file) for file in SOURCES)
        if not name.startswith(MAY_NAME_ATEN)
        for line in find_aten_names(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert not found, "only the folders in MAY_NAME_ATEN name operators of ATen"


def test_recipes_are_data() -> None:
    logic = ast.If | ast.IfExp | ast.For | ast.While | ast.FunctionDef | ast.Lambda | ast.ClassDef
    recipes = [file for file in SOURCES if file.parent.name == "recipes"]
    assert recipes
    found = [
        f"{file.name}:{node.lineno}"
        for file in recipes
        if file.name not in ("__init__.py", "recipe.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, logic)
    ]
    assert not found, "a recipe names passes; what decides or computes belongs in a pass"


def test_every_module_is_named_after_its_idea() -> None:
    assert not [file for file in SOURCES if {file.stem, file.parent.name} & EMPTY_NAMES]


def test_pins_lie_within_the_declared_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["dev"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    for requirement in map(Requirement, declared):
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} does not admit {version}"
