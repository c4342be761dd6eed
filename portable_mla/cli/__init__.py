"""The command line: portable-mla doctor, explain, demo."""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    """Run the command line; exits 2 with one line where its packages (the extra `cli`) are missing."""
    for package in ("typer", "rich"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            reason = " ".join(str(error).split())
            print(
                f"portable-mla: the command line needs {package} ({reason}): pip install portable-mla[cli]",
                file=sys.stderr,
            )
            raise SystemExit(2) from None
    from portable_mla.cli.app import app

    app(prog_name="portable-mla")
