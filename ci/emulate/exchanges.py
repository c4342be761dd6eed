"""Exchanges between lanes: swizzles, permutes, swaps and DPP, which reads an operand from another lane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ci.emulate.lanes import LANE, WAVE, Lanes, Repair, Words, register
from ci.emulate.memory import lds_addresses, lds_offset


def swizzle(instruction: Any, lanes: Lanes) -> None:
    """Each lane reads the one that its pattern names, of its four or of its half wave."""
    pattern = lds_offset(instruction)
    if pattern & 0x8000:
        source = LANE & ~3 | pattern >> 2 * (LANE & 3) & 3
    else:
        keep, set_, flip = pattern & 31, pattern >> 5 & 31, pattern >> 10 & 31
        source = LANE & 32 | ((LANE & 31 & keep) | set_) ^ flip
    _exchange(instruction, lanes, lanes.vectors[register(instruction.addr)].copy(), source)


def fetch_lane(instruction: Any, lanes: Lanes) -> None:
    """Each lane reads the one whose index, times four, its address is."""
    index = lds_addresses(instruction, lanes, lds_offset(instruction)) >> 2 & WAVE - 1
    _exchange(instruction, lanes, lanes.vectors[register(instruction.data0)].copy(), index)


def _exchange(instruction: Any, lanes: Lanes, value: Words, source: NDArray[Any]) -> None:
    lanes.write(instruction.vdst, np.where(lanes.active[source], value[source], 0).astype(np.uint32))


def swap_lanes(half: int) -> Repair:
    """gfx950: the upper half of each group of the first register changes places with the lower one of the second."""

    def swap(instruction: Any, lanes: Lanes) -> None:
        first, second = register(instruction.vdst), register(instruction.src0)
        a, b = lanes.vectors[first].copy(), lanes.vectors[second].copy()
        upper = LANE % (2 * half) >= half
        lanes.vectors[first] = np.where(upper, b[(LANE - half) % WAVE], a)
        lanes.vectors[second] = np.where(upper, b, a[(LANE + half) % WAVE])

    return swap


def _dpp_source(control: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The lane that each lane reads, and whether there is one."""
    in_row, row, distance = LANE & 15, LANE & ~15, control & 15
    always = np.ones(WAVE, np.bool_)
    kinds: dict[int, tuple[NDArray[Any], NDArray[np.bool_]]] = {
        0x10: (LANE + distance, in_row + distance < 16),
        0x11: (LANE - distance, in_row >= distance),
        0x12: (row + (in_row - distance & 15), always),
    }
    if control < 0x100:
        return LANE & ~3 | control >> 2 * (LANE & 3) & 3, always
    single: dict[int, tuple[NDArray[Any], NDArray[np.bool_]]] = {
        0x130: (LANE + 1, LANE < WAVE - 1),
        0x134: ((LANE + 1) % WAVE, always),
        0x138: (LANE - 1, LANE > 0),
        0x13C: ((LANE - 1) % WAVE, always),
        0x140: (row + 15 - in_row, always),
        0x141: (LANE & ~7 | 7 - (LANE & 7), always),
        0x142: (row - 1, LANE >= 16),
        0x143: (np.full(WAVE, 31), LANE >= 32),
    }
    return single[control] if control in single else kinds[control >> 4]


def _dpp_operand(instruction: Any, lanes: Lanes) -> tuple[Words, NDArray[np.bool_]]:
    """The first operand as it arrives, and the lanes that are written."""
    source, there = _dpp_source(int(instruction.dpp))
    source = np.clip(source, 0, WAVE - 1)
    there = there & lanes.active[source]
    rows = int(instruction.row_mask) >> (LANE >> 4) & 1
    banks = int(instruction.bank_mask) >> ((LANE & 15) >> 2) & 1
    written = lanes.active & (rows & banks).astype(np.bool_) & (there | bool(int(instruction.bc)))
    value = np.where(there, lanes.vectors[register(instruction.vsrc0)][source], 0).astype(np.uint32)
    return _signed(instruction, 0, value), written


def _signed(instruction: Any, index: int, value: Words) -> Words:
    """The operand's modifiers of a floating-point number."""
    if int(getattr(instruction, f"src{index}_abs", 0) or 0):
        value = value & np.uint32(0x7FFFFFFF)
    return value ^ np.uint32(0x80000000) if int(getattr(instruction, f"src{index}_neg", 0) or 0) else value


def move_across(instruction: Any, lanes: Lanes) -> None:
    """DPP: a move from another lane."""
    value, written = _dpp_operand(instruction, lanes)
    lanes.vectors[register(instruction.vdst)][written] = value[written]


def combine_across(operation: Callable[[Words, Words], Words]) -> Repair:
    """DPP: an operation whose first operand comes from another lane."""

    def combine(instruction: Any, lanes: Lanes) -> None:
        first, written = _dpp_operand(instruction, lanes)
        second = _signed(instruction, 1, lanes.vectors[register(instruction.vsrc1)])
        result = operation(first, second)
        lanes.vectors[register(instruction.vdst)][written] = result[written]

    return combine


def on_words(dtype: Any, operation: Callable[..., Any]) -> Callable[[Words, Words], Words]:
    """An operation on registers that hold numbers of this type."""

    def operate(a: Words, b: Words) -> Words:
        result: Words = operation(a.view(dtype), b.view(dtype)).astype(dtype).view(np.uint32)
        return result

    return operate
