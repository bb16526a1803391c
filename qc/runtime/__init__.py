"""Run compiled models: all that a machine needs which does not compile.

Imports numpy, and tokenizers, jinja2 and (for steps left to torch) torch when they are first
needed.
"""

from qc.runtime.artifact import Artifact, load
from qc.runtime.session import Session

__all__ = ["Artifact", "Session", "load"]
