"""Targets: facts about a machine, and the default recipe that a target name asks for.

A name is `device[:architecture]-recipe`: "cpu-w4", "cpu:x86_64-v3-w4a16", "torch-f32",
"cuda:sm_80+sm_90-w4", "arm64-dotprod-w4", "rpi5-w4". It is parsed here and nowhere else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from qc.errors import TargetError, nearest

if TYPE_CHECKING:
    from qc.ir.types import ActivationFormat


CODE_PRODUCTS = {"int8": "int8", "e4m3": "f8", "e2m1": "f4"}
"""Codes of activations, and the fact of a GPU that multiplies them as they are."""
LEAST_GROUP = 128
"""Channels that share a scale, from which on codes of 8 bits are multiplied as they are: sums of
fewer would be widened and scaled more often than matrix units gain. docs/decisions/015."""


@dataclass(frozen=True)
class Gpu:
    """What kernel rules may ask about a GPU, or about all GPUs that an artifact is for.

    `products` are the types that its matrix units multiply. `shared` is the most shared memory of
    a block, in bytes. The last three are nominal, of the largest card of the architecture:
    multiprocessors, bytes a second from memory, and operations a second of the units on float16.
    """

    architectures: tuple[str, ...]
    products: frozenset[str]
    shared: int
    multiprocessors: int
    bandwidth: float
    operations: float
    dtype: str = "f16"
    """What values between kernels are: "f16" or "bf16"; sums are float32 in either case."""

    def multiplies(self, format: ActivationFormat, channels: int) -> bool:
        """Say whether codes of activations may be multiplied as they are; others are widened to
        `dtype`."""
        wide = format.code == "e2m1" or (format.group or channels) >= min(LEAST_GROUP, channels)
        return wide and CODE_PRODUCTS.get(format.code) in self.products

    def also(self, other: Gpu) -> Gpu:
        """Return what holds on both."""
        return Gpu(
            (*self.architectures, *other.architectures),
            self.products & other.products,
            min(self.shared, other.shared),
            min(self.multiprocessors, other.multiprocessors),
            min(self.bandwidth, other.bandwidth),
            min(self.operations, other.operations),
            self.dtype,
        )


@dataclass(frozen=True)
class Target:
    """What passes and kernel rules may ask about a machine.

    `gpu` is there for a GPU, the others are for CPUs. The last three of them are for predictions,
    and nominal: what one core of a typical server of the architecture sustains, not what this
    machine was measured to do.
    """

    device: str
    architecture: str
    features: frozenset[str] = frozenset()
    vector_bytes: int = 16
    llvm_cpu: str = "x86-64"
    gigahertz: float = 2.5
    bytes_per_cycle: float = 4.0
    """From memory."""
    vector_instructions_per_cycle: float = 2.0
    gpu: Gpu | None = None
    machine: str = "x86_64"
    """What `uname -m` says there."""
    llvm_triple: str = "x86_64-linux-gnu"
    llvm_features: tuple[str, ...] = ()
    """Beyond those of `llvm_cpu`, as LLVM spells them: "+dotprod"."""

    @property
    def is_android(self) -> bool:
        """Say whether programs find Android's libc there."""
        return self.llvm_triple.endswith("android")

    def has(self, *features: str) -> bool:
        """Say whether the machine has all of these instruction sets."""
        return self.features.issuperset(features)

    def __str__(self) -> str:
        return self.device if self.architecture == "host" else f"{self.device}:{self.architecture}"


V2 = frozenset({"sse3", "ssse3", "sse4_1", "sse4_2", "popcnt"})
V3 = V2 | {"avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
VNNI = V4 | {"avx512_vnni"}
VBMI = VNNI | {
    "avx512ifma", "avx512vbmi", "avx512_vbmi2", "avx512_bitalg", "avx512_vpopcntdq",
    "gfni", "vaes", "vpclmulqdq",
}  # fmt: skip
AMX = VBMI | {"avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8"}

CPUS = {
    "x86_64-v2": Target("cpu", "x86_64-v2", V2, 16, "x86-64-v2", 2.5, 3.0),
    "x86_64-v3": Target("cpu", "x86_64-v3", V3, 32, "x86-64-v3", 3.0, 4.0),
    "x86_64-v4": Target("cpu", "x86_64-v4", V4, 64, "x86-64-v4", 2.5, 4.0),
    "avx512-vnni": Target("cpu", "avx512-vnni", VNNI, 64, "cascadelake", 2.5, 4.0),
    "avx512-vbmi": Target("cpu", "avx512-vbmi", VBMI, 64, "icelake-server", 2.6, 4.0),
    "avx512-amx": Target("cpu", "avx512-amx", AMX, 64, "sapphirerapids", 2.1, 5.0),
}
"""Every CPU target by architecture, from the least to the most capable.

The features are all vector instruction sets that LLVM may use for its CPU of that name: what lacks
one of them (a Cascade Lake lacks VBMI) must not be taken for it.
Clocks are base clocks of server parts (Westmere, Haswell to Zen 3, Skylake-SP, Cascade Lake, Ice
Lake-SP and Zen 4, Sapphire Rapids). A core keeps 10 to 16 cache lines in flight to a memory 60 to
100 ns away: 7 to 13 GB/s. Two vector units do a multiplication and an addition each, or one integer
operation each.
"""

ARM_V8 = frozenset({"asimd"})
ARM_DOTPROD = ARM_V8 | {"asimddp"}
ARM_I8MM = ARM_DOTPROD | {"i8mm"}
ANDROID = "linux-android"


def arm(
    name: str,
    features: frozenset[str],
    cpu: str,
    gigahertz: float,
    bytes_per_cycle: float,
    vector_instructions: float = 2.0,
    system: str = "linux-gnu",
) -> Target:
    """Describe an ARM CPU, whose vectors have 16 bytes; features are spelled as by Linux."""
    spelled = {"asimddp": "+dotprod", "i8mm": "+i8mm"}
    # Android's shadow call stack is found by x18.
    reserved = ["+reserve-x18"] if system == ANDROID else []
    return Target(
        "arm64", name, features, 16, cpu, gigahertz, bytes_per_cycle, vector_instructions,
        machine="aarch64", llvm_triple=f"aarch64-{system}",
        llvm_features=(*(spelled[f] for f in sorted(features) if f in spelled), *reserved),
    )  # fmt: skip


ARMS = {
    "arm64": arm("generic", ARM_V8, "generic", 1.5, 2.5),
    "arm64-dotprod": arm("dotprod", ARM_DOTPROD, "generic", 2.4, 4.0),
    "arm64-i8mm": arm("i8mm", ARM_I8MM, "generic", 2.6, 6.0),
    "rpi3": arm("rpi3", ARM_V8, "cortex-a53", 1.2, 1.7, 1.0),
    "rpi4": arm("rpi4", ARM_V8, "cortex-a72", 1.5, 2.7),
    "rpi5": arm("rpi5", ARM_DOTPROD, "neoverse-n1", 2.4, 4.0),
    "graviton2": arm("graviton2", ARM_DOTPROD, "neoverse-n1", 2.5, 4.5),
    "graviton3": arm("graviton3", ARM_I8MM, "neoverse-v1", 2.6, 6.0, 4.0),
    "android-arm64": arm("android", ARM_V8, "generic", 1.8, 2.5, system=ANDROID),
    "android-arm64-dotprod": arm(
        "android-dotprod", ARM_DOTPROD, "generic", 2.2, 4.0, system=ANDROID
    ),
    "android-arm64-i8mm": arm("android-i8mm", ARM_I8MM, "generic", 2.4, 6.0, system=ANDROID),
    "pixel-6": arm("pixel-6", ARM_DOTPROD, "neoverse-n1", 2.25, 5.0, system=ANDROID),
    "pixel-8": arm("pixel-8", ARM_I8MM, "cortex-a715", 2.4, 6.0, system=ANDROID),
}
"""Every ARM machine that packages are built for, by name: instruction sets, then devices.

A device is the instruction sets and the scheduling of its cores: those of a Raspberry Pi 3, 4 and 5
(Cortex-A53, A72, A76), of AWS Graviton2 and 3 (Neoverse N1, V1), the middle cores of Tensor G1 and
G3 (Cortex-A76, A715). A Neoverse N1 is a Cortex-A76, and LLVM's model of it spills less. Clocks are
nominal; a core reads 2 GB/s of LPDDR2, 4 of LPDDR4, 10 to 16 of LPDDR4X, LPDDR5 and server memory.
Nobody has timed any of them.
"""


AMPERE = frozenset({"f16", "bf16", "int8"})
ADA = AMPERE | {"f8"}
BLACKWELL = ADA | {"f4"}

GPUS = {
    "sm_80": Gpu(("sm_80",), AMPERE, 166_912, 108, 2.04e12, 312e12),
    "sm_86": Gpu(("sm_86",), AMPERE, 101_376, 84, 0.936e12, 142e12),
    "sm_89": Gpu(("sm_89",), ADA, 101_376, 128, 1.01e12, 165e12),
    "sm_90": Gpu(("sm_90",), ADA, 232_448, 132, 3.35e12, 989e12),
    "sm_100": Gpu(("sm_100",), BLACKWELL, 232_448, 148, 8.0e12, 2250e12),
    "sm_120": Gpu(("sm_120",), BLACKWELL, 101_376, 170, 1.79e12, 210e12),
}
"""Every GPU of NVIDIA by architecture.

Data sheets of A100 80 GB, RTX 3090 and A40, RTX 4090, H100 SXM, B200 and RTX 5090 (dense products
with float32 sums); shared memory: CUDA C++ Programming Guide, table of compute capabilities.
"""

ROCM = {"gfx942": Gpu(("gfx942",), AMPERE, 65_536, 304, 5.3e12, 1307e12)}
"""MI300X, by AMD's data sheet: kernels without PTX are compiled for it; none has run on one."""


def cpu_features() -> frozenset[str]:
    """Read this machine's instruction sets (Linux); empty where the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return frozenset()
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split()) | {"sse3"}
    return frozenset()


def host_cpu() -> Target:
    """Return the most capable CPU target that this machine fulfils.

    AMX is chosen by name only: on a Xeon with it, w4 in SmolLM2's shapes took 0.88 (one thread)
    and 0.96 (four) of VNNI's time for a prompt of 512 tokens, 0.95 and 1.07 for a token.
    """
    present = cpu_features()
    chosen = [cpu for cpu in CPUS.values() if "amx_tile" not in cpu.features]
    fitting = [cpu for cpu in chosen if cpu.features <= present]
    if not fitting:
        raise TargetError("this machine's CPU is not an x86-64-v2; the oldest that qc knows")
    return fitting[-1]


def host_gpu() -> str:
    """Return the architecture of the first GPU here; that of an H100 where none is.

    TargetError where it is one that no kernel is compiled for.
    """
    found = capability_here()
    if found is None:
        return "sm_90"
    name = f"sm_{found}"
    if name in GPUS:
        return name
    older = [known for known in GPUS if known[:-1] == name[:-1] and known <= name]
    if not older:
        raise TargetError(f"the GPU here is {name}; kernels are compiled for {', '.join(GPUS)}")
    return older[-1]


def capability_here() -> int | None:
    """Ask the driver for the compute capability of the first GPU, 90 for 9.0; None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    major, minor = ctypes.c_int(), ctypes.c_int()
    asked = ((75, major), (76, minor))  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
    if driver.cuInit(0) or any(
        driver.cuDeviceGetAttribute(ctypes.byref(into), attribute, 0) for attribute, into in asked
    ):
        return None
    return 10 * major.value + minor.value


def gpu_target(device: str, architectures: Sequence[str]) -> Target:
    """Return the target of an artifact for several architectures: facts that hold on all."""
    table = GPUS if device == "cuda" else ROCM
    gpu = reduce(Gpu.also, (table[name] for name in architectures))
    return Target(device, "+".join(architectures), gpu=gpu)


GPU_TYPES = ("f16", "bf16")
"""What a GPU can compute in: float16 is 8 times as exact, bfloat16 has the range of float32."""


def computing(target: Target, dtype: str | None) -> Target:
    """Return a GPU that computes in another type; TargetError where there is no choice."""
    if dtype is None:
        return target
    if target.gpu is None:
        raise TargetError(f"dtype is for GPUs: {target} computes in float32")
    if dtype not in GPU_TYPES:
        hint = nearest(dtype, GPU_TYPES) or f"; known are {', '.join(GPU_TYPES)}"
        raise TargetError(f"a GPU does not compute in {dtype!r}{hint}")
    return replace(target, gpu=replace(target.gpu, dtype=dtype))


def parse_target(name: str, recipes: Collection[str]) -> tuple[Target, str]:
    """Split a target name into the machine and the name of one of `recipes`.

    TargetError lists the nearest known names.
    """
    machine, _, recipe = name.rpartition("-")
    known_machine = machine in machine_names() or machine in CPUS or "+" in machine
    if recipe in recipes and known_machine:
        return parse_machine(machine), recipe
    known = [f"{machine}-{recipe}" for machine in machine_names() for recipe in recipes]
    hint = nearest(name, known) or f"; known are {', '.join(known)}"
    raise TargetError(f"unknown target {name!r}{hint}")


def parse_machine(name: str) -> Target:
    """Return the machine called `name`: "cpu" and "cuda" (this one), "cpu:x86_64-v3", "torch",
    "cuda:sm_80+sm_90" for several in one artifact.

    TargetError lists the nearest known names.
    """
    if name == "cpu":
        return host_cpu()
    if name == "torch":
        return Target("torch", "host")
    if name == "cuda":
        return gpu_target("cuda", [host_gpu()])
    device, _, architecture = name.partition(":")
    several = architecture.split("+")
    known = GPUS if device == "cuda" else ROCM if device == "rocm" else {}
    if len(set(several)) == len(several) and known.keys() >= set(several):
        return gpu_target(device, [each for each in known if each in several])
    if name in ARMS or name in CPUS:
        return ARMS.get(name) or CPUS[name]
    if name in machine_names():
        return CPUS[architecture]
    hint = nearest(name, machine_names()) or f"; known are {', '.join(machine_names())}"
    raise TargetError(f"unknown machine {name!r}{hint}")


def machine_names() -> list[str]:
    """List every machine that a target name may start with."""
    gpus = [*(f"cuda:{name}" for name in GPUS), *(f"rocm:{name}" for name in ROCM)]
    cpus = [f"cpu:{architecture}" for architecture in CPUS]
    return ["cpu", "cuda", "torch", *cpus, *ARMS, *gpus]
