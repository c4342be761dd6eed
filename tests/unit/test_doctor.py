"""portable-mla doctor: what is here, and why something is not."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from portable_mla.cli.packages import PACKAGES
from portable_mla.dispatch.registry import BACKENDS, ORDER
from portable_mla.runtime.packages import state_of
from tests.support.invoking import invoke, invoke_json, run_module

pytestmark = pytest.mark.usefixtures("plain_environment")


def package_state(name: str) -> str:
    return str(state_of(next(package for package in PACKAGES if package.name == name)))


def stub(
    folder: Path, module: str, *, files: tuple[str, ...] = (), distribution: tuple[str, str] | None = None
) -> None:
    """A package on disk whose import raises."""
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text("raise SystemExit('importing this would end the process')\n")
    for file in files:
        (folder / module / file).touch()
    if distribution is not None:
        metadata = folder / f"{distribution[0].replace('-', '_')}-{distribution[1]}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution[0]}\nVersion: {distribution[1]}\n"
        )


def test_doctor_says_in_plain_lines_what_serves_here() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0
    assert "What serves DeepSeek-V3 TP8 decode on cpu\n  cpu: chosen\n" in result.stdout


def test_doctor_prints_one_json_object() -> None:
    values = invoke_json("doctor")
    assert values["served"] is True
    assert values["serving"]["cpu"]["chosen"] == "cpu"
    assert values["packages"]["torch"] == f"installed {importlib.metadata.version('torch')}"
    assert set(values["backends"]) == set(BACKENDS)
    assert values["devices"][-1]["device"] == "cpu"


def test_doctor_names_the_models_whose_own_attention_is_not_served() -> None:
    named = invoke_json("doctor")["models_not_served"]
    assert {"deepseek-v3.2", "glm-5", "glm-5.3-flash", "a.x-k2"} <= set(named)
    assert not {"deepseek-v3", "kimi-k3"} & set(named)
    assert f"  glm-5: {named['glm-5']}\n" in invoke("doctor").stdout


def test_doctor_survives_vendor_packages_whose_import_would_raise(tmp_path: Path) -> None:
    for module in ("flash_mla", "flash_attn_interface", "flashinfer", "aiter", "vllm"):
        stub(tmp_path, module)
    result = run_module("doctor", "--json", path=tmp_path)
    packages = json.loads(result.stdout)["packages"]
    assert result.returncode == 0, result.stderr
    assert packages["vllm"].startswith("installed")
    assert packages["aiter"].startswith("unrelated namesake")


def test_the_unrelated_aiter_is_told_from_amds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(tmp_path, "aiter", distribution=("aiter", "0.13.20191203"))
    monkeypatch.syspath_prepend(tmp_path)
    assert package_state("aiter").startswith("unrelated namesake 0.13.20191203 without mla.py and ops")


@pytest.mark.parametrize("distribution", ["aiter", "amd-aiter"])
def test_amds_aiter_is_found_without_importing_it(
    distribution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(tmp_path, "aiter", files=("mla.py", "ops"), distribution=(distribution, "0.1.8"))
    monkeypatch.syspath_prepend(tmp_path)
    assert package_state("aiter").startswith("installed 0.1.8")


def test_two_distributions_of_one_module_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(tmp_path, "flash_mla", distribution=("sgl-flash-mla", "1.0.0"))
    monkeypatch.syspath_prepend(tmp_path)
    assert package_state("flash_mla") == "installed 1.0.0 (from sgl-flash-mla)"
    assert package_state("sgl-flash-mla") == "installed 1.0.0"


def test_a_distribution_without_its_module_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(tmp_path, "elsewhere", distribution=("vllm", "1.2.3"))
    monkeypatch.syspath_prepend(tmp_path)
    assert package_state("vllm") == "broken: vllm 1.2.3 is installed, but there is no module vllm"


def test_a_bare_folder_of_a_packages_name_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flashinfer").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert package_state("flashinfer").startswith("broken: a folder without __init__.py")


@pytest.mark.parametrize("error", [SystemExit("gone"), RuntimeError("gone"), ImportError("gone")])
def test_an_import_hook_that_raises_is_a_broken_package(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hook:
        def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            if name == "flashinfer":
                raise error
            return None

    monkeypatch.setattr(sys, "meta_path", [Hook(), *sys.meta_path])
    assert package_state("flashinfer") == f"broken: {type(error).__name__}: gone"


@pytest.fixture
def broken_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "broken_backend_module.py").write_text("raise OSError('libvendor.so: undefined symbol')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(BACKENDS, "broken", "broken_backend_module:BACKEND")
    return "broken"


def test_doctor_reports_a_backend_whose_module_raises(broken_backend: str) -> None:
    state = invoke_json("doctor")["backends"][broken_backend]
    assert state == "broken: OSError: libvendor.so: undefined symbol"


def test_doctor_exits_1_where_a_broken_backend_breaks_dispatch(
    broken_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arch in list(ORDER):
        monkeypatch.setitem(ORDER, arch, (broken_backend, *ORDER[arch]))
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "none: broken: OSError: libvendor.so: undefined symbol" in result.stdout


def test_doctor_shows_the_settings_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTABLE_MLA_BACKEND", "reference")
    values = invoke_json("doctor")
    assert values["settings"]["PORTABLE_MLA_BACKEND"] == "reference"
    assert values["serving"]["cpu"]["chosen"] == "reference"


@pytest.mark.parametrize(("name", "value"), [("PORTABLE_MLA_BACKEND", "best"), ("PORTABLE_MLA_BACKED", "cpu")])
def test_doctor_reports_an_invalid_environment_and_exits_1(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert f"invalid: {name}: " in result.stdout
