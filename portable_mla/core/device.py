"""Arch: what a device is. The only module that asks torch about hardware, and never at import."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from portable_mla.core.arch import ARCHS, Arch, arch_named
from portable_mla.errors import UnsupportedDevice

_HERE = nullcontext()
# torch.cuda.current_device without its check that CUDA is initialised: for where there are tensors of a GPU.
current_gpu: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


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
