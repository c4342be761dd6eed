"""Runs the waves of a launch, one after another between barriers, instruction by instruction.

Functional only: no timing, no races, no missing waits, no bounds; matrix instructions accumulate in float64 and round
once. Instructions that the emulator lacks, or gets wrong, are those of instructions.py.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ci.emulate.code_object import CodeObject
from ci.emulate.halves import Halves, in_low_registers
from ci.emulate.instructions import repair_of
from ci.emulate.lanes import Lanes
from ci.emulate.source import decoder, emulator

WAVE, REGISTERS, SCALARS = 64, 256, 260
SCALED_PREFIX = 0xD3AC  # what an instruction of 16 bytes begins with, a scaled matrix instruction
LEAST_LDS = 256


@dataclass(frozen=True)
class _Instruction:
    decoded: Any
    compiled: Callable[..., Any] | None  # by the emulator
    buffers: list[int]
    repaired: Callable[[Any, Lanes], None] | None
    halves: Halves | None
    barrier: bool


class _Wave:
    """Registers of one wave; done when it ended."""

    def __init__(
        self, code: CodeObject, threads: int, first: int, place: tuple[int, int, int], start: list[int]
    ) -> None:
        emu = emulator()
        self.state = emu._init_wave(
            code.entry, first, threads, threads, 1, 1, 0, code.resources, code.scratch, "cdna", *place, start, WAVE
        )
        self._scratch = ctypes.create_string_buffer(max(code.scratch * WAVE, 64))
        self.scalars = _words(self.state.sgpr_buf._buf.va_addr, SCALARS)
        self.vectors = _words(self.state.vgpr_buf._buf.va_addr, REGISTERS * WAVE).reshape(REGISTERS, WAVE)
        self.accumulators = _words(self.state.accvgpr_buf._buf.va_addr, REGISTERS * WAVE).reshape(REGISTERS, WAVE)
        self._fnuz, self.done = code.fnuz, False

    def lanes(self, lds: NDArray[np.uint8]) -> Lanes:
        """What repaired instructions work on."""
        return Lanes(self.scalars, self.vectors, self.accumulators, lds, fnuz=self._fnuz)

    def pointers(self, lds: int) -> list[Any]:
        """In the emulator's order of buffers; device memory is the whole address space, from 0."""
        state, memory = self.state, 0
        addresses = (
            state.sgpr_buf._buf.va_addr, state.vgpr_buf._buf.va_addr, memory, lds, ctypes.addressof(self._scratch),
            state.accvgpr_buf._buf.va_addr,
        )  # fmt: skip
        return [ctypes.c_uint64(address) for address in addresses]


def _words(address: int, count: int) -> NDArray[np.uint32]:
    return np.ctypeslib.as_array((ctypes.c_uint32 * count).from_address(address))


def run_workgroups(code: CodeObject, grid: tuple[int, int, int], threads: int, arguments: bytes) -> None:
    """One launch."""
    block = code.argument_block(arguments, grid, threads)
    memory = ctypes.create_string_buffer(block, len(block))
    start = code.user_registers(block, ctypes.addressof(memory))
    program: dict[int, _Instruction] = {}
    with emulator()._MXCSRContext():
        for z, y, x in itertools.product(*map(range, reversed(grid))):
            lds = np.zeros(max(code.shared, LEAST_LDS), np.uint8)
            waves = [_Wave(code, threads, first, (x, y, z), start) for first in range(0, threads, WAVE)]
            views = [(wave, wave.pointers(lds.ctypes.data), wave.lanes(lds)) for wave in waves]
            while not all(wave.done for wave in waves):
                for wave, pointers, lanes in views:
                    _run_to_barrier(wave, pointers, lanes, program)


def _run_to_barrier(wave: _Wave, pointers: list[Any], lanes: Lanes, program: dict[int, _Instruction]) -> None:
    state, end = wave.state, emulator().ENDPGM_PC
    while not wave.done:
        at = state.pc
        if at == end:
            wave.done = True
            return
        instruction = program.get(at) or program.setdefault(at, _decode(at))
        if instruction.repaired is not None:
            lanes.read_active()
            instruction.repaired(instruction.decoded, lanes)
            state.pc = at + instruction.decoded.size()
        else:
            assert instruction.compiled is not None
            run = functools.partial(instruction.compiled, *[pointers[index] for index in instruction.buffers])
            if instruction.halves is None:
                run()
            else:
                lanes.read_active()
                state.pc = instruction.halves.address
                instruction.halves.run(run, lanes)
                state.pc = at + instruction.decoded.size()
        if instruction.barrier:
            return


def _decode(address: int) -> _Instruction:
    emu, decode = emulator(), decoder()
    raw = ctypes.string_at(address, 16)
    decoded = decode(raw, "cdna")
    if type(decoded).__name__ == "VOP3PX2" and int.from_bytes(raw[2:4], "little") != SCALED_PREFIX:
        raw = raw[:8] + bytes(8)  # the emulator takes any 8 bytes before a matrix instruction for its prefix
        decoded = decode(raw, "cdna")
    name = emu._op_name(decoded)
    form = type(decoded).__name__ + (" to LDS" if int(getattr(decoded, "lds", 0) or 0) else "")
    repaired = repair_of(form, name)
    if repaired is not None:
        return _Instruction(decoded, None, [], repaired, None, barrier=False)
    halves = in_low_registers(decoded, name, raw)
    raw = raw if halves is None else halves.code.raw
    try:
        program, runtime = emu._get_runner(raw[: decoded.size() + 4], "cdna")
    except (KeyError, RuntimeError, AssertionError) as unknown:  # it has no such name, or cannot read its definition
        raise NotImplementedError(f"the emulator has no {form} {name}, nor has instructions.py") from unknown
    barrier = isinstance(decoded, emu.irc.SOPP) and decoded.op in emu._BARRIER_OPS
    return _Instruction(decoded, runtime.fxn, program.arg.globals, None, halves, barrier)
