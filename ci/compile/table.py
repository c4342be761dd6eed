"""The compiled decode kernels that estimates read, written from the budgets by python -m ci.compile.table."""

from __future__ import annotations

import json
from pathlib import Path

from ci.compile.gate import Used, read_budgets
from portable_mla.cli.estimate import TABLE
from portable_mla.cli.hardware import PARTS

PATH = Path(__file__).resolve().parents[2] / "portable_mla/cli" / TABLE
TRITON = "3.6"
LOADS = ("pointer", "descriptor", "gather")
GLUON = "gluon 512+"


def rows(used: Used) -> dict[str, dict[str, object]]:
    """The bf16 decode kernels of one architecture by name; of the Gluon kernel one a geometry, which all are alike."""
    kept: dict[str, dict[str, object]] = {}
    for name, found in sorted(used.items()):
        head, *rest = name.split()
        if head == "gluon" or (head == "decode" and rest[-1] in LOADS):
            row = {key: getattr(found, key) for key in ("registers", "loop_spills", "shared", "matrix")}
            kept.setdefault(" ".join((head, rest[0])) if head == "gluon" else name, row)
    return kept


def rendered() -> str:
    """The table's text, a kernel a line."""
    archs = []
    for arch in PARTS:
        lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows(read_budgets()[TRITON][arch]).items()]
        archs.append(f" {json.dumps(arch)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(archs) + "\n}\n"


if __name__ == "__main__":
    PATH.write_text(rendered())
