"""What a compiled kernel is checked for without a GPU: the signs of code that cannot be fast.

Counts are of machine instructions (SASS). The loop is the longest one with tensor cores.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from qc.backends.triton.compile import WARP, inspect
from qc.backends.triton.kernel import Cubin

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)([^;]*);")
TENSOR_CORES = (
    "HMMA",
    "HGMMA",
    "IMMA",
    "IGMMA",
    "QMMA",
    "QGMMA",
    "UTCHMMA",
    "UTCIMMA",
    "UTCQMMA",
    "UTCOMMA",
    "OMMA",
)
CONVERSIONS = ("I2F", "F2F", "I2FP")


@dataclass(frozen=True)
class Loop:
    """The instructions of a kernel's longest loop."""

    instructions: tuple[str, ...]

    def count(self, *prefixes: str) -> int:
        """Count the instructions that start so."""
        return sum(1 for each in self.instructions if each.startswith(prefixes))

    @property
    def kinds(self) -> Counter[str]:
        """Count the instructions by kind."""
        return Counter(each.split(".")[0] for each in self.instructions)


def loop_of(cubin: Cubin) -> Loop:
    """Disassemble a kernel; return its longest loop that multiplies: a backward branch and what it
    repeats."""
    found = [
        (int(place, 16), name, rest)
        for place, name, rest in INSTRUCTION.findall(inspect(cubin.binary, "-sass"))
    ]
    loops: list[list[str]] = []
    for place, name, rest in found:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target is None or int(target[1], 16) >= place:
            continue
        start = int(target[1], 16)
        loops.append([each for at, each, _ in found if start <= at <= place])
    multiplying = [each for each in loops if any(name.startswith(TENSOR_CORES) for name in each)]
    longest = sorted(multiplying or loops, key=lambda each: len(each))
    return Loop(tuple(longest[-1]) if longest else ())


def instructions_per_weight(cubin: Cubin, weights: int) -> float:
    """Return the loop's instructions of all threads over the weights of one step."""
    return len(loop_of(cubin).instructions) * WARP * cubin.num_warps / weights


def objections(cubin: Cubin, weights: int, budget: float) -> list[str]:
    """List what is wrong with the loop of a kernel that streams packed weights."""
    loop = loop_of(cubin)
    found = []
    if cubin.spills:
        found.append(f"{cubin.spills} bytes of registers are spilled")
    if not loop.count(*TENSOR_CORES):
        found.append("no tensor-core instruction in the loop")
    if loop.count(*CONVERSIONS):
        found.append(f"{loop.count(*CONVERSIONS)} slow conversions in the loop")
    if loop.count("STS"):
        found.append(f"{loop.count('STS')} stores to shared memory in the loop")
    wide = [each for each in loop.instructions if each.startswith(("LDGSTS", "LDG"))]
    if not any(".128" in each for each in wide):
        found.append("no load of 16 bytes in the loop")
    used = instructions_per_weight(cubin, weights)
    if used > budget:
        found.append(f"{used:.2f} instructions per weight, {budget:.2f} are allowed")
    return found
