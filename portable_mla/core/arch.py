"""Arch: what an architecture is, and the table of those that are served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from portable_mla.errors import UnsupportedDevice

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
