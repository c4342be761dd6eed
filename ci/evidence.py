"""What the kernels have run on, by architecture: ci/evidence.json, from which the README's table is made.

silicon: written by hand after a run on the GPU itself; emulated: by python -m tests.emulated.run --record; what is
compiled follows from ci/compile/budgets.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EVIDENCE = Path(__file__).with_name("evidence.json")
Evidence = dict[str, Any]


def read_evidence(path: Path = EVIDENCE) -> Evidence:
    """By kind, then by architecture."""
    found: Evidence = json.loads(path.read_text())
    return found


def record_emulated(triton_version: str, archs: Sequence[str], checks: int, path: Path = EVIDENCE) -> None:
    """Note that all checks of these architectures passed with this Triton version."""
    evidence = read_evidence(path)
    for arch in archs:
        evidence["emulated"].setdefault(arch, {})[triton_version] = checks
    path.write_text(json.dumps(evidence, indent=1) + "\n")
