"""Lanes: the registers of a wave and the LDS of its workgroup, which repaired instructions work on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
WAVE = 64
EXEC = 126  # the scalar register, and the next, that say which lanes are active
VECTOR = 256  # operands from here on are vector registers
LANE = np.arange(WAVE)


@dataclass
class Lanes:
    """Registers of a wave, [register] or [register, lane], and the workgroup's LDS in bytes; fnuz: its fp8 is."""

    scalars: Words
    vectors: Words
    accumulators: Words
    lds: NDArray[np.uint8]
    active: NDArray[np.bool_] = field(default_factory=lambda: np.ones(WAVE, np.bool_))
    fnuz: bool = False

    def read_active(self) -> None:
        """What EXEC says now."""
        bits = np.array([self.scalars[EXEC], self.scalars[EXEC + 1]], np.uint32).view(np.uint8)
        self.active = np.unpackbits(bits, bitorder="little").astype(np.bool_)

    def source(self, operand: Any) -> Words:
        """A vector register, or a scalar or constant for every lane."""
        at = int(operand.offset)
        return self.vectors[at - VECTOR].copy() if at >= VECTOR else np.full(WAVE, self.scalars[at], np.uint32)

    def write(self, operand: Any, value: Words) -> None:
        """Into the active lanes of a vector register."""
        self.vectors[register(operand)][self.active] = value[self.active]

    def bank(self, instruction: Any) -> Words:
        """The registers that a memory instruction means."""
        return self.accumulators if int(getattr(instruction, "acc", 0) or 0) else self.vectors


Repair = Callable[[Any, Lanes], None]


def register(operand: Any) -> int:
    """Index of a vector register."""
    return int(operand.offset) & 0xFF
