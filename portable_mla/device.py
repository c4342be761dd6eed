"""Arch: what a device is. The only module that asks torch about hardware, and never at import."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from portable_mla.errors import UnsupportedDevice

_HERE = nullcontext()
# torch.cuda.current_device without its check that CUDA is initialised: for where there are tensors of a GPU.
current_gpu: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
Vendor = Literal["nvidia", "amd", "cpu"]


@dataclass(frozen=True)
class Arch:
    """One device architecture.

    name: "sm90", "gfx942", "cpu" ...; units: SMs, CUs or CPU threads; shared_memory: bytes one workgroup may use
    (0 on a CPU); wave: lanes that run in lockstep.
    """

    name: str
    vendor: Vendor
    units: int
    shared_memory: int
    wave: int

    @property
    def float8(self) -> torch.dtype | None:
        """The e4m3 flavour that the matrix units read; None where any flavour is converted in software."""
        if self.vendor == "cpu":
            return None
        return torch.float8_e4m3fnuz if self.name == "gfx942" else torch.float8_e4m3fn

    def converts(self, float8: torch.dtype) -> bool:
        """Whether there are instructions that convert this flavour to wider floats."""
        return float8 == self.float8 and self.name not in ("sm80", "sm86", "gfx90a")


# Units are those of the usual part: A100, A6000, L40S, H100, B200, B300, RTX PRO 6000, GB10, one MI250X die, MI300X,
# MI355X.
ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch("cpu", "cpu", 1, 0, 1),
        Arch("sm80", "nvidia", 108, 166912, 32),
        Arch("sm86", "nvidia", 84, 101376, 32),
        Arch("sm89", "nvidia", 142, 101376, 32),
        Arch("sm90", "nvidia", 132, 232448, 32),
        Arch("sm100", "nvidia", 148, 232448, 32),
        Arch("sm103", "nvidia", 148, 232448, 32),
        Arch("sm120", "nvidia", 188, 101376, 32),
        Arch("sm121", "nvidia", 48, 101376, 32),
        Arch("gfx90a", "amd", 110, 65536, 64),
        Arch("gfx942", "amd", 304, 65536, 64),
        Arch("gfx950", "amd", 256, 163840, 64),
    )
}

# Why the rest is refused: the longest matching prefix of the name answers.
REFUSED: dict[str, str] = {
    "sm": "its compute capability is not one this library has tile rules for",
    "sm70": "Volta has no bfloat16 matrix units",
    "sm75": "Turing has no bfloat16 matrix units",
    "gfx": "it is not a CDNA2, CDNA3 or CDNA4 part",
    "gfx10": "RDNA2 has no matrix units",
    "gfx11": "RDNA3 runs waves of 32 with WMMA, and the kernels are written for CDNA's MFMA",
    "gfx12": "RDNA4 runs waves of 32 with WMMA, and the kernels are written for CDNA's MFMA",
    "mps": "Triton has no Metal backend",
    "xpu": "no Intel GPU kernels are written",
}


def arch_named(name: str) -> Arch:
    """The architecture called `name`, with the units of its usual part; needs no such device.

    Raises UnsupportedDevice with the reason for any other name.
    """
    if name in ARCHS:
        return ARCHS[name]
    prefixes = [prefix for prefix in REFUSED if name.startswith(prefix)]
    why = REFUSED[max(prefixes, key=len)] if prefixes else "no architecture of that name is known"
    raise UnsupportedDevice(f"{name!r} is not supported: {why}. Supported: {', '.join(ARCHS)}")


def is_capturing(tensor: Tensor) -> bool:
    """Whether the current stream, on a GPU that the tensor is on, is being captured in a graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def arch_of(device: torch.device | str) -> Arch:
    """The architecture of a torch device, read once per device index.

    Raises UnsupportedDevice with the reason for devices this library cannot serve.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return replace(ARCHS["cpu"], units=torch.get_num_threads())
    if device.type == "cuda":
        return _gpu_arch(torch.cuda.current_device() if device.index is None else device.index)
    return arch_named(device.type)


@functools.cache
def _gpu_arch(index: int) -> Arch:
    properties = torch.cuda.get_device_properties(index)
    # HIP first, and capability by equality: an MI210 reports (9, 0) like Hopper, RDNA4 reports (12, 0) like sm120.
    if torch.version.hip:
        arch = arch_named(properties.gcnArchName.split(":")[0])
        shared_memory = int(properties.shared_memory_per_block)
    else:
        arch = arch_named(f"sm{properties.major}{properties.minor}")
        shared_memory = int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]
    units, wave = int(properties.multi_processor_count), int(properties.warp_size)
    return replace(arch, units=units, shared_memory=shared_memory, wave=wave)


@dataclass(frozen=True)
class LocalDevice:
    """One device of this machine: its torch name, its product name and its architecture, or why it is refused."""

    device: str
    product: str
    arch: Arch | None
    refusal: str = ""


def local_devices() -> tuple[LocalDevice, ...]:
    """Every device torch can see on this machine, the CPU last."""
    found = []
    for index in range(torch.cuda.device_count()):
        name = f"cuda:{index}"
        product = torch.cuda.get_device_name(index)
        try:
            found.append(LocalDevice(name, product, arch_of(name)))
        except UnsupportedDevice as refusal:
            found.append(LocalDevice(name, product, None, str(refusal)))
    return (*found, LocalDevice("cpu", f"{torch.get_num_threads()} threads", arch_of("cpu")))


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Kernels launch on the current GPU, which need not be the tensor's: there, for as long as this is entered."""
    index = tensor.get_device()
    return _HERE if index < 0 or index == current_gpu() else torch.cuda.device_of(tensor)


@functools.cache
def built_for_amd() -> bool:
    """Whether torch was built for HIP."""
    return torch.version.hip is not None


def runtime() -> str:
    """The GPU runtime torch was built for: "HIP 7.1", "CUDA 13.0" or "none"."""
    if torch.version.hip:
        return f"HIP {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "none"
