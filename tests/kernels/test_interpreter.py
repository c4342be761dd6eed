"""The kernels in Triton's interpreter, which needs a process of its own: TRITON_INTERPRET is read at import."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITE = ["tests/interpreter", "-q", "-p", "no:cacheprovider"]
LEAST_TESTS = 570  # fewer, and some are no longer collected


def collected(environment: dict[str, str]) -> int:
    """How many tests the suite has."""
    command = [sys.executable, "-m", "pytest", *SUITE, "--collect-only"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    found = re.search(r"(\d+) tests collected", done.stdout)
    assert found is not None, done.stdout[-2000:]
    return int(found[1])


@pytest.mark.timeout(1800)
def test_the_interpreter_suite_passes() -> None:
    pytest.importorskip("triton", reason="needs the package triton")
    command = [sys.executable, "-m", "pytest", *SUITE]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "2"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    print(done.stdout[-10_000:], done.stderr[-10_000:])
    assert done.returncode == 0, "the interpreter suite fails, see its output"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) == collected(environment) >= LEAST_TESTS


def test_this_process_collects_nothing_of_it() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET is set here")
    command = [sys.executable, "-m", "pytest", "tests/interpreter", "-q", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout
