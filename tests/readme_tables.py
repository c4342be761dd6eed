"""README's tables, generated from the registry and the settings: python -m tests.readme_tables rewrites them."""

from __future__ import annotations

import re
from pathlib import Path

from portable_mla.device import ARCHS
from portable_mla.registry import ORDER
from portable_mla.settings import VARIABLES

README = Path(__file__).parent.parent / "README.md"


def support_matrix() -> str:
    """One row an architecture: its part's figures and its backends."""
    rows = ["| architecture | vendor | units | shared memory | backends, best first |", "|---|---|---|---|---|"]
    for arch in ARCHS.values():
        memory = f"{arch.shared_memory // 1024} KiB" if arch.shared_memory else "-"
        units = "threads" if arch.vendor == "cpu" else str(arch.units)
        rows.append(f"| {arch.name} | {arch.vendor} | {units} | {memory} | {', '.join(ORDER[arch.name])} |")
    return "\n".join(rows)


def environment() -> str:
    """One row a variable."""
    rows = ["| variable | values | default | meaning |", "|---|---|---|---|"]
    for name, variable in VARIABLES.items():
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
