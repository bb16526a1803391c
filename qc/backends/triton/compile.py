"""Compile a launch to machine code for one architecture, on a machine without a GPU.

Results are kept on disk by content: generated source, device functions, types, options, Triton's
version. Nothing is compiled twice, in one run or in another.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import warnings
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qc.backends.triton.emit import cache_folder, load_function
from qc.backends.triton.kernel import FIRST_TO_OVERLAP, OVERLAP, Constant, Cubin, Launch

WARP, WAVE = 32, 64
"""Threads that run as one, on NVIDIA's GPUs and on AMD's."""
ALIGNED = [["tt.divisibility", 16]]


def compile_launch(launch: Launch, architecture: int | str, folder: Path | None = None) -> Cubin:
    """Compile for compute capability `architecture` (80, 90, ...) or for an AMD GPU ("gfx942"), or
    read it from the cache."""
    function = load_function(launch.source, launch.function)
    key = cache_key(function, launch, architecture)
    stem = (folder or cache_folder() / "cubin") / key[:2] / key
    found = read_cubin(stem)
    if found is None:
        if isinstance(architecture, str):
            found = build_for_amd(function, launch, architecture)
        elif launch.multiplies_small_floats or architecture not in OLDER:
            found = build(function, launch, architecture)
        else:
            older = compile_launch(launch, OLDER[architecture], folder)
            found = assembled(older, architecture)
        write_cubin(stem, found)
    return found


def cache_key(function: Any, launch: Launch, architecture: int | str) -> str:
    """Hash everything that a compiled kernel depends on."""
    types = [(each.name, each.type) for each in launch.parameters]
    options = [
        launch.num_warps, launch.num_stages, architecture, triton.__version__,
        launch.most_registers, launch.most_programs,
    ]  # fmt: skip
    constants = constants_for(launch, architecture)
    text = json.dumps([function.cache_key, types, constants, options])
    return hashlib.sha256(text.encode()).hexdigest()


def constants_for(launch: Launch, architecture: int | str) -> list[tuple[str, Constant]]:
    """Return the constants of a function for an architecture."""
    overlap = isinstance(architecture, int) and architecture >= FIRST_TO_OVERLAP
    return [(name, overlap if name == OVERLAP else value) for name, value in launch.constants]


def compiled(function: Any, launch: Launch, target: GPUTarget) -> Any:
    """Run Triton's compiler."""
    signature = {each.name: each.type for each in launch.parameters}
    signature |= dict.fromkeys(dict(launch.constants), "constexpr")
    aligned = {(n,): ALIGNED for n, p in enumerate(launch.parameters) if p.type.startswith("*")}
    count = len(launch.parameters)
    known = constants_for(launch, target.arch)
    constants = {(count + n,): value for n, (_, value) in enumerate(known)}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    options = {
        "num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip
    if launch.most_registers is not None and target.backend == "cuda":
        options["maxnreg"] = launch.most_registers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return triton.compile(source, target=target, options=options)


OLDER = {86: 80, 89: 80}
"""Architectures of one generation: the code of the older one is theirs, up to the assembler, but
for products of small floats, which sm_89 has alone."""


def assembled(older: Cubin, architecture: int) -> Cubin:
    """Assemble the code of an older architecture of the same generation for a newer one."""
    ptx = older.ptx.replace(f".target sm_{older.architecture}", f".target sm_{architecture}")
    with NamedTemporaryFile("w", suffix=".ptx") as source, NamedTemporaryFile() as target:
        source.write(ptx)
        source.flush()
        name = f"--gpu-name=sm_{architecture}"
        command = [str(tool("ptxas")), "-lineinfo", name, source.name, "-o", target.name]
        subprocess.run(command, check=True, capture_output=True)
        binary = Path(target.name).read_bytes()
    registers, spills = resources(binary)
    return replace(
        older, architecture=architecture, ptx=ptx, binary=binary, registers=registers, spills=spills
    )


def build(function: Any, launch: Launch, architecture: int) -> Cubin:
    """Compile, and read what the binary says of itself."""
    kernel = compiled(function, launch, GPUTarget("cuda", architecture, WARP))
    data = checked(launch, kernel.metadata)
    registers, spills = resources(kernel.asm["cubin"])
    shared = max(data.shared, reserved(launch.most_programs, architecture))
    return Cubin(
        data.name, architecture, kernel.asm["cubin"], kernel.asm["ptx"], shared,
        data.num_warps, tuple(each.type for each in launch.parameters), registers, spills,
    )  # fmt: skip


SHARED = {90: 228 << 10}
"""Bytes of shared memory of a multiprocessor, where programs are kept from crowding by them."""
OF_BLOCK = 1 << 10
"""Bytes that each block takes beside what it asks for. CUDA C++ Programming Guide 13, compute
capability 9.0."""


def reserved(programs: int | None, architecture: int) -> int:
    """Return the bytes of shared memory with which no more than so many programs find room."""
    if programs is None or architecture not in SHARED:
        return 0
    return SHARED[architecture] // (programs + 1) - OF_BLOCK + 16


def checked(launch: Launch, metadata: Any) -> Any:
    """Return what Triton says of a kernel, unless it asks for what no launcher gives."""
    scratch = metadata.global_scratch_size + metadata.profile_scratch_size
    if scratch or getattr(metadata, "tensordesc_meta", None):
        raise ValueError(
            f"{launch.rule} asks for {scratch} bytes of scratch, which no artifact has"
        )
    return metadata


def build_for_amd(function: Any, launch: Launch, architecture: str) -> Cubin:
    """Compile for a GPU of AMD's, and read what the assembly says of itself."""
    kernel = compiled(function, launch, GPUTarget("hip", architecture, WAVE))
    data = checked(launch, kernel.metadata)
    text = kernel.asm["amdgcn"]
    registers, private = (
        int(number_after(text, name)) for name in (".vgpr_count", ".private_segment_fixed_size")
    )
    return Cubin(
        data.name, architecture, kernel.asm["hsaco"], "", data.shared, data.num_warps,
        tuple(each.type for each in launch.parameters), registers, private,
    )  # fmt: skip


def number_after(text: str, name: str) -> str:
    """Read a number off the metadata of AMD's assembly."""
    found = re.search(rf"^ +{re.escape(name)}: +(\d+)$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"the assembly names no {name}")
    return found[1]


def read_cubin(stem: Path) -> Cubin | None:
    """Return a kept kernel; None where there is none, or only part of one."""
    description, binary = stem.with_suffix(".json"), stem.with_suffix(".cubin")
    try:
        known = json.loads(description.read_text())
        return Cubin(
            **{**known, "parameters": tuple(known["parameters"])}, binary=binary.read_bytes()
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_cubin(stem: Path, cubin: Cubin) -> None:
    """Keep a kernel: the description last, for what lacks one is not read."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    known = {name: value for name, value in asdict(cubin).items() if name != "binary"}
    for suffix, content in ((".cubin", cubin.binary), (".json", json.dumps(known).encode())):
        with NamedTemporaryFile(dir=stem.parent, delete=False) as written:
            written.write(content)
        Path(written.name).replace(stem.with_suffix(suffix))


# ---------------------------------------------------------------- what a binary says


@cache
def tool(name: str) -> Path:
    """Return one of NVIDIA's tools that Triton brings."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def inspect(binary: bytes, *flags: str) -> str:
    """Run cuobjdump on a binary."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool("cuobjdump")), *flags, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(binary: bytes) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes of its stack: spills."""
    text = inspect(binary, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump names no resources: {text[:200]!r}")
    return int(found[1]), int(found[2]) + int(found[3])
