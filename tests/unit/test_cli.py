"""The console entry."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.invoking import run_module

pytestmark = pytest.mark.usefixtures("plain_environment")


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_missing_package_of_the_command_line_is_one_line_and_exit_code_2(package: str, tmp_path: Path) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module named {package}')\n")
    result = run_module("doctor", path=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "pip install portable-mla[cli]" in result.stderr


def test_the_module_runs_as_a_program_and_exits_with_the_commands_code() -> None:
    result = run_module("explain", "--arch", "sm75")
    assert result.returncode == 1
    assert result.stderr.startswith("UnsupportedDevice: 'sm75' is not supported: ")


def test_help_names_every_command() -> None:
    result = run_module("--help")
    assert all(command in result.stdout for command in ("doctor", "explain", "demo"))
