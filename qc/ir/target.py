"""Targets: facts about a machine, and the default recipe that a target name asks for.

A name is `device[:architecture]-recipe`: "cpu-w4", "cpu:x86_64-v3-w4a16", "torch-f32". It is
parsed here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from qc.errors import TargetError, nearest


@dataclass(frozen=True)
class Target:
    """What passes and kernel rules may ask about a machine.

    The last three are for predictions, and nominal: what one core of a typical server of the
    architecture sustains, not what this machine was measured to do.
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

    AMX is chosen by name only: its kernels have been checked with the tile instructions written out
    in plain code, not yet on a machine that has them. TODO: drop this once they have run on one.
    """
    present = cpu_features()
    proven = [cpu for cpu in CPUS.values() if "amx_tile" not in cpu.features]
    fitting = [cpu for cpu in proven if cpu.features <= present]
    if not fitting:
        raise TargetError("this machine's CPU is not an x86-64-v2; the oldest that qc knows")
    return fitting[-1]


def parse_target(name: str, recipes: Collection[str]) -> tuple[Target, str]:
    """Split a target name into the machine and the name of one of `recipes`.

    TargetError lists the nearest known names.
    """
    machine, _, recipe = name.rpartition("-")
    if recipe in recipes and machine in machine_names():
        return parse_machine(machine), recipe
    known = [f"{machine}-{recipe}" for machine in machine_names() for recipe in recipes]
    hint = nearest(name, known) or f"; known are {', '.join(known)}"
    raise TargetError(f"unknown target {name!r}{hint}")


def parse_machine(name: str) -> Target:
    """Return the machine called `name`: "cpu" (this one), "cpu:x86_64-v3", "torch".

    TargetError lists the nearest known names.
    """
    if name == "cpu":
        return host_cpu()
    if name == "torch":
        return Target("torch", "host")
    architecture = name.removeprefix("cpu:")
    if name in machine_names():
        return CPUS[architecture]
    hint = nearest(name, machine_names()) or f"; known are {', '.join(machine_names())}"
    raise TargetError(f"unknown machine {name!r}{hint}")


def machine_names() -> list[str]:
    """List every machine that a target name may start with."""
    return ["cpu", "torch", *(f"cpu:{architecture}" for architecture in CPUS)]
