"""Detection: HIP first, capability by equality, everything else refused with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from portable_mla import UnsupportedDevice, arch_named, arch_of
from portable_mla.core import device
from portable_mla.core.arch import ARCHS
from portable_mla.dispatch.registry import ORDER


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Pretend that torch sees one GPU with the given properties."""

    def pretend(hip: str | None, **properties: object) -> None:
        defaults = {
            "multi_processor_count": 7,
            "warp_size": 32,
            "shared_memory_per_block_optin": 99,
            "shared_memory_per_block": 64,
        }
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**{**defaults, **properties})
        )
        device._gpu_arch.cache_clear()

    yield pretend
    device._gpu_arch.cache_clear()


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm80"), ((8, 6), "sm86"), ((8, 9), "sm89"), ((9, 0), "sm90"), ((10, 0), "sm100"), ((10, 3), "sm103"),
     ((12, 0), "sm120"), ((12, 1), "sm121")],
)  # fmt: skip
def test_nvidia_parts_are_known_by_their_exact_capability(gpu: Any, capability: tuple[int, int], name: str) -> None:
    gpu(None, major=capability[0], minor=capability[1])
    arch = arch_of("cuda:0")
    assert (arch.name, arch.vendor, arch.units, arch.shared_memory) == (name, "nvidia", 7, 99)


@pytest.mark.parametrize("name", ["gfx90a", "gfx942", "gfx950"])
def test_amd_parts_are_known_by_name_though_they_report_nvidias_capability(gpu: Any, name: str) -> None:
    # An MI210 reports (9, 0), like Hopper.
    gpu("7.1", major=9, minor=0, gcnArchName=f"{name}:sramecc+:xnack-", warp_size=64)
    arch = arch_of("cuda:0")
    assert (arch.name, arch.vendor, arch.wave, arch.shared_memory) == (name, "amd", 64, 64)


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 7), (9, 1), (11, 0), (13, 0)])
def test_other_nvidia_parts_are_refused(gpu: Any, capability: tuple[int, int]) -> None:
    gpu(None, major=capability[0], minor=capability[1])
    with pytest.raises(UnsupportedDevice, match=f"sm{capability[0]}{capability[1]}.*Supported: cpu, sm80"):
        arch_of("cuda:0")


@pytest.mark.parametrize("name", ["gfx1100", "gfx1200", "gfx1201", "gfx906"])
def test_other_amd_parts_are_refused_though_they_report_a_known_capability(gpu: Any, name: str) -> None:
    gpu("7.1", major=12, minor=0, gcnArchName=name)  # RDNA4 reports (12, 0), like sm120
    with pytest.raises(UnsupportedDevice, match=name):
        arch_of("cuda:0")


@pytest.mark.parametrize(
    ("name", "why"),
    [("sm75", "Turing"), ("gfx1100", "RDNA3"), ("gfx1200", "RDNA4"), ("mps", "Metal"), ("xpu", "Intel"),
     ("tpu", "no architecture of that name")],
)  # fmt: skip
def test_a_refused_name_says_why(name: str, why: str) -> None:
    with pytest.raises(UnsupportedDevice, match=why):
        arch_named(name)


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_a_refused_device_says_why(kind: str) -> None:
    with pytest.raises(UnsupportedDevice, match=kind):
        arch_of(kind)


def test_a_device_is_read_once(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(None, major=9, minor=0)
    first = arch_of("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: pytest.fail("asked again"))
    assert arch_of("cuda:0") is first


def test_every_architecture_has_an_order_of_backends() -> None:
    assert set(ORDER) == set(ARCHS)


def test_fp8_flavours_follow_the_matrix_units() -> None:
    assert arch_named("gfx942").float8 is torch.float8_e4m3fnuz
    assert arch_named("gfx950").float8 is torch.float8_e4m3fn
    assert arch_named("sm90").float8 is torch.float8_e4m3fn
    assert arch_named("cpu").float8 is None


@pytest.mark.parametrize(("index", "entered"), [(-1, []), (1, []), (2, [2])])
def test_the_device_is_switched_only_for_a_tensor_of_another_gpu(
    index: int, entered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    switched: list[int] = []

    def exchange(index: int) -> int:
        switched.append(index)
        return 1

    monkeypatch.setattr(device, "current_gpu", lambda: 1)
    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", lambda index: index)
    tensor: Any = SimpleNamespace(get_device=lambda: index, is_cuda=index >= 0)
    with device.on_device_of(tensor):
        assert switched == entered
