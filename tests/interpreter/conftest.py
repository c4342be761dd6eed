"""Collects nothing unless Triton interprets, and repairs its interpreter for the whole run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def repaired_interpreter() -> Iterator[None]:
    """bfloat16 as the hardware computes it."""
    from tests.interpreter.repair import repaired

    with repaired():
        yield
