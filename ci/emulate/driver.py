"""EmulatedDriver: a Triton driver whose device is an emulated AMD GPU, so that a library launches as on a real one.

Triton binds, specialises and compiles for the architecture, refuses kernels that want more shared memory than it has,
and hands over a code object; tensors live in the memory of the CPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from ci.emulate.code_object import CodeObject, pack_arguments
from ci.emulate.waves import run_workgroups
from portable_mla.core.arch import Arch

SCRATCH_POINTERS = 2  # Triton ends the arguments with pointers to global and profile scratch, null where it needs none


class EmulatedLauncher:
    """Runs one compiled kernel; Triton builds it from the kernel's source and metadata."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._types: list[str] = list(source.signature.values())
        self._threads = metadata.num_warps * metadata.warp_size
        scratch = getattr(metadata, "global_scratch_size", 0), getattr(metadata, "profile_scratch_size", 0)
        assert not any(scratch), f"{metadata.name} wants scratch memory of {scratch} bytes"

    def __call__(self, x: int, y: int, z: int, stream: int, function: CodeObject, *rest: Any) -> None:
        """rest: Triton's metadata and hooks, then the kernel's arguments."""
        values = rest[len(rest) - len(self._types) :]
        kept = [(kind, value) for kind, value in zip(self._types, values, strict=True) if kind != "constexpr"]
        run_workgroups(function, (x, y, z), self._threads, pack_arguments(kept, SCRATCH_POINTERS))


class EmulatedDriver(DriverBase):
    """What Triton asks of a driver."""

    launcher_cls = EmulatedLauncher

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self._arch = arch
        self.utils = self  # Triton asks both for the device's properties
        self.launches: Counter[str] = Counter()

    @classmethod
    def is_active(cls) -> Any:
        """Never by itself."""
        return False

    def get_current_target(self) -> Any:
        return GPUTarget("hip", self._arch.name, self._arch.wave)

    def get_active_torch_device(self) -> Any:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is compiled to C++")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("an emulator tells no time")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._arch.shared_memory}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Module, kernel, registers, spills and most threads, of which only the kernel and the last are read."""
        self.launches[name] += 1
        code = CodeObject(binary, name, shared)
        return code, code, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        """Memory goes with the object."""


def install(arch: Arch) -> EmulatedDriver:
    """Make this process launch on the emulated GPU. One architecture a process: launches are remembered."""
    emulated = EmulatedDriver(arch)
    driver.set_active(emulated)
    return emulated
