"""Know the machine that an artifact is loaded on."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

from qc.errors import ArtifactError
from qc.runtime.manifest import TargetFacts

__all__ = ["check_machine", "cpu_features"]


_ALIASES = {"pni": "sse3", "abm": "lzcnt", "asimddp": "dotprod", "asimdhp": "fullfp16"}
"""What Linux calls otherwise than compilers do."""


@cache
def cpu_features() -> frozenset[str]:
    """Return the features of every CPU here, as /proc/cpuinfo and as compilers spell them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    # x86 says "flags", ARM says "Features"; CPUs of one machine may differ.
    of_each = [
        frozenset(line.partition(":")[2].split())
        for line in lines
        if line.partition(":")[0].strip() in ("flags", "Features")
    ]
    if not of_each:
        return frozenset()
    found = frozenset.intersection(*of_each)
    return found | {alias for name, alias in _ALIASES.items() if name in found}


def check_machine(target: TargetFacts) -> None:
    """Raise ArtifactError unless code for `target` runs here; arch "any" means no machine code."""
    arch = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    if target.arch not in (arch, "any"):
        raise ArtifactError(
            f"this artifact was built for {target.arch}; this machine is {arch}: "
            "compile the model for it"
        )
    missing = [feature for feature in target.features if feature not in cpu_features()]
    if missing:
        raise ArtifactError(
            f"this artifact was built for a CPU with {', '.join(missing)}; this machine has not: "
            f"compile the model on it, or for a target without (it was built for {target.name})"
        )
