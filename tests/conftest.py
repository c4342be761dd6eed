"""Hardware markers, property-test profiles, and NaN in every torch.empty."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.errors import Unsatisfiable

from portable_mla import NoBackend, UnsupportedDevice, arch_of
from tests.support.environment import HYPOTHESIS, REQUIRE, TILES, asked
from tests.support.prefill_cases import prefill_targets
from tests.support.targets import Target, local_targets

if TYPE_CHECKING:
    from tests.support.library_machine import Machine

# A backend of few geometries refuses most cases, which the tests then leave out.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile("dev", max_examples=25, deadline=None, suppress_health_check=_SLOW)
settings.register_profile(
    "ci", max_examples=150, deadline=None, suppress_health_check=_SLOW, derandomize=True, print_blob=True
)
settings.register_profile("nightly", max_examples=5000, deadline=None, suppress_health_check=_SLOW, print_blob=True)
settings.load_profile(asked(HYPOTHESIS) or ("ci" if os.environ.get("CI") else "dev"))

_MARKERS = {
    "gpu": "any supported GPU",
    "cuda": "an NVIDIA GPU",
    "rocm": "an AMD GPU",
    **{name: name for name in ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx90a", "gfx942", "gfx950")},
}


def _local_arch() -> str:
    try:
        return arch_of("cuda" if torch.cuda.is_available() else "cpu").name
    except UnsupportedDevice:
        return "cpu"


def _present(marker: str) -> bool:
    arch = _local_arch()
    kinds = {"gpu": arch != "cpu", "cuda": arch.startswith("sm"), "rocm": arch.startswith("gfx")}
    return kinds.get(marker, arch == marker)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the hardware markers; compile for another architecture where its tiles are asked for."""
    for marker, needs in _MARKERS.items():
        config.addinivalue_line("markers", f"{marker}: needs {needs}")
    if tiles := asked(TILES):
        _force(tiles)


def _force(tiles: str) -> None:
    from ci.tile_override import arch_with_tiles_of, force_code

    local = arch_of("cuda" if torch.cuda.is_available() else "cpu")
    try:
        arch_with_tiles_of(tiles, local)
    except ValueError as error:
        raise pytest.UsageError(f"PORTABLE_MLA_TEST_TILES: {error}") from error
    force_code(tiles, local)


def pytest_report_header() -> str:
    """What this run can prove."""
    targets = ", ".join(str(target) for target in local_targets())
    return f"portable_mla: {_local_arch()}, required {asked(REQUIRE) or '-'}, targets {targets}"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Stop where the required hardware is absent: a GPU job must not pass by skipping."""
    required = asked(REQUIRE)
    if required and not _present(required):
        pytest.exit(f"PORTABLE_MLA_TEST_REQUIRE={required}, but this machine is {_local_arch()}", returncode=3)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests for absent hardware, naming it."""
    for item in items:
        for marker in _MARKERS:
            if item.get_closest_marker(marker) and not _present(marker):
                item.add_marker(pytest.mark.skip(reason=f"needs {_MARKERS[marker]}; this is {_local_arch()}"))
                break


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A library's refusal, which is made before anything is launched, is a skip that says why."""
    try:
        return (yield)
    except (NoBackend, Unsatisfiable) as refusal:
        callspec = getattr(item, "callspec", None)
        target = None if callspec is None else callspec.params.get("target")
        if isinstance(target, Target) and target.of_a_library:
            pytest.skip(f"{target} refuses every case: {refusal}")
        raise


@pytest.fixture(scope="session", autouse=True)
def nan_filled_empty() -> Iterator[None]:
    """torch.empty returns NaN, so that a value nobody wrote cannot pass for a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", params=local_targets(), ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    """Every backend on every device of this machine."""
    value: Target = request.param
    return value


@pytest.fixture(scope="session", params=prefill_targets(), ids=str)
def prefill_target(request: pytest.FixtureRequest) -> Target:
    """Every backend that serves prefill, on every device of this machine."""
    value: Target = request.param
    return value


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine without vendor libraries."""
    from tests.support.library_machine import machine

    with machine(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No PORTABLE_MLA_ variable is set."""
    for name in [name for name in os.environ if name.startswith("PORTABLE_MLA_")]:
        monkeypatch.delenv(name)
