"""Another NVIDIA architecture's kernels on the GPU of this machine: its tiles, and its code as far as that runs here.

An older architecture's code is its PTX, which the driver translates. A newer one's runs nowhere else: its tiles are
compiled for this GPU, with mma.sync where there would be wgmma.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from triton import knobs

from portable_mla.core.arch import ARCHS, Arch

NO_WGMMA = "DISABLE_MMA_V3"  # of Triton's compiler


def arch_with_tiles_of(name: str, local: Arch) -> Arch:
    """What to ask dispatch for, to get another architecture's tiles on the local GPU.

    Raises ValueError where the tiles do not fit, or are no NVIDIA GPU's.
    """
    arch = ARCHS[name]
    if (local.vendor, arch.vendor) != ("nvidia", "nvidia") or arch.shared_memory > local.shared_memory:
        raise ValueError(
            f"expected tiles of an NVIDIA architecture with at most the {local.shared_memory} bytes of shared memory "
            f"of {local.name}, got {name} with {arch.shared_memory}"
        )
    return replace(arch, units=local.units)


def force_code(name: str, local: Arch) -> None:
    """From now on, this process compiles every kernel as for that architecture, in a cache of its own."""
    os.environ["TRITON_CACHE_DIR"] = f"{knobs.cache.dir}/as_{name}"
    if _capability(name) < _capability(local.name):
        knobs.runtime.override_arch = name
        hook: Any = leave_ptx  # Triton 3.6 calls it with arguments alone, 3.9 also without
        knobs.runtime.add_stages_inspection_hook = hook
    else:
        os.environ[NO_WGMMA] = "1"


def leave_ptx(*arguments: Any) -> tuple[str, str] | None:
    """Triton's hook on the stages of a compilation: PTX is of the overridden architecture, where Triton asks for the
    device's, and stays what is loaded. Without arguments, what tells such kernels from others: a key and its hash."""
    if not arguments:
        return "leave_ptx", "leave_ptx"
    backend, stages, options, _, capability = arguments
    stages["ptx"] = lambda source, metadata: backend.make_ptx(source, metadata, options, capability)
    stages["cubin"] = lambda source, metadata: source.encode() + b"\0"
    return None


def _capability(name: str) -> int:
    return int(name.removeprefix("sm"))
