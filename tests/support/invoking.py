"""Running the command line from tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from portable_mla.cli.app import app

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str


def invoke(*arguments: str) -> Outcome:
    """Run a command in this process."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def invoke_json(*arguments: str) -> dict[str, Any]:
    """The object a command prints with --json."""
    values: dict[str, Any] = json.loads(invoke(*arguments, "--json").stdout)
    return values


def run_module(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, with `path` first on its import path."""
    folders = [str(folder) for folder in (path, ROOT) if folder is not None]
    return subprocess.run(
        [sys.executable, "-m", "portable_mla.cli", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=False,
    )
