"""Instructions on 16 bits, whose registers above 127 the emulator takes for upper halves of lower ones, as on RDNA.

On CDNA they are registers like any other, and the upper half of a result becomes 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ctypes import Array, addressof, c_char, create_string_buffer
from dataclasses import dataclass
from typing import Any

import numpy as np

from ci.emulate.lanes import VECTOR, Lanes

HALF = 16
FIRST_TAKEN = 128  # the first register that the emulator takes for another one
PLACES = {"src0": 0, "vsrc1": 9, "vdst": 17}  # the bit at which an operand begins
OPERANDS = {"VOP1": ("src0", "vdst"), "VOP2": ("src0", "vsrc1", "vdst"), "VOPC": ("src0", "vsrc1")}
KEEPS_UPPER = re.compile("V_(FMAC|MAC|MADMK|MADAK)_")


@dataclass(frozen=True)
class Halves:
    """Such an instruction, and how it runs: its stand_ins change places with the registers that were meant.

    code: it, in memory, where the emulator reads its operands; result: the register whose upper half becomes 0.
    """

    code: Array[c_char]
    registers: list[int]
    stand_ins: list[int]
    result: int | None

    @property
    def address(self) -> int:
        """Of the code."""
        return addressof(self.code)

    def run(self, instruction: Callable[[], object], lanes: Lanes) -> None:
        """instruction: executes the code."""
        self._change_places(lanes)
        instruction()
        self._change_places(lanes)
        if self.result is not None:
            lanes.vectors[self.result][lanes.active] &= np.uint32(0xFFFF)

    def _change_places(self, lanes: Lanes) -> None:
        both = self.registers + self.stand_ins
        lanes.vectors[both] = lanes.vectors[self.stand_ins + self.registers]


def in_low_registers(decoded: Any, name: str, raw: bytes) -> Halves | None:
    """The instruction with registers below 128; None if it is not on 16 bits."""
    operands = OPERANDS.get(type(decoded).__name__.removesuffix("_LIT"), ())
    bits = decoded.canonical_op_bits if operands else {}
    if HALF not in bits.values():
        return None
    registers = {operand: int(getattr(decoded, operand).offset) - VECTOR for operand in operands}
    free = (register for register in range(FIRST_TAKEN) if register not in registers.values())
    stand_ins = {register: next(free) for register in set(registers.values()) if register >= FIRST_TAKEN}
    word = int.from_bytes(raw[:4], "little")
    for operand, register in registers.items():
        word += stand_ins.get(register, register) - register << PLACES[operand]
    result = registers.get("vdst") if bits["d"] == HALF and not KEEPS_UPPER.match(name) else None
    code = create_string_buffer(word.to_bytes(4, "little") + raw[4:], len(raw))
    return Halves(code, list(stand_ins), list(stand_ins.values()), result)
