"""README's tables, generated from the registry and the settings: python -m tests.support.readme_tables."""

from __future__ import annotations

import re
from pathlib import Path

from ci.compile.gate import read_budgets
from ci.evidence import read_evidence
from portable_mla.core.arch import ARCHS
from portable_mla.dispatch.registry import ORDER
from portable_mla.settings import VARIABLES
from tests.support.environment import TEST_VARIABLES

README = Path(__file__).parents[2] / "README.md"


def support_matrix() -> str:
    """One row an architecture: its part's figures, what our kernels ran on, and its backends."""
    head = ("architecture", "vendor", "units", "shared memory", "ran on silicon", "emulated", "compiled", "backends")
    rows = [f"| {' | '.join(head)}, best first |", "|---" * len(head) + "|"]
    evidence, budgets = read_evidence(), read_budgets()
    for arch in ARCHS.values():
        silicon = evidence["silicon"].get(arch.name, "no")
        emulated = "; ".join(f"{n} checks, Triton {v}" for v, n in evidence["emulated"].get(arch.name, {}).items())
        compiled = ", ".join(f"Triton {version}" for version, used in budgets.items() if arch.name in used)
        memory = f"{arch.shared_memory // 1024} KiB" if arch.shared_memory else "-"
        units = "threads" if arch.vendor == "cpu" else str(arch.units)
        proof = " | ".join((silicon, emulated or "-", compiled or "-"))
        backends = ", ".join(ORDER[arch.name])
        rows.append(f"| {arch.name} | {arch.vendor} | {units} | {memory} | {proof} | {backends} |")
    return "\n".join(rows)


def environment() -> str:
    """One row a variable."""
    rows = ["| variable | values | default | meaning |", "|---|---|---|---|"]
    for name, variable in (VARIABLES | TEST_VARIABLES).items():
        rows.append(f"| `{name}` | {variable.values} | {variable.default} | {variable.doc} |")
    return "\n".join(rows)


def rendered(text: str) -> str:
    """The README with its tables as the code has them."""
    for name, table in (("support matrix", support_matrix()), ("environment", environment())):
        block = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = block.subn(rf"\g<1>{table}\n\g<2>", text)
        assert count == 1, f"README.md has {count} blocks named {name!r}"
    return text


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
