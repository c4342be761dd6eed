"""Reads and writes of LDS, of memory through buffers, and atomics."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ci.emulate.lanes import WAVE, Lanes, Repair, Words, register

M0 = 124  # the scalar register that says where in LDS a load goes
NO_SCALAR = 124  # operands from here on are no scalar registers that hold an address


def lds_offset(instruction: Any) -> int:
    return int(instruction.offset1) << 8 | int(instruction.offset0)


def _lds_bytes(lanes: Lanes, address: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """[lane, size]; zeros outside of the LDS, as the hardware reads."""
    found = np.zeros((WAVE, size), np.uint8)
    inside = lanes.active & (address >= 0) & (address + size <= lanes.lds.size)
    found[inside] = lanes.lds[address[inside][:, None] + np.arange(size)]
    return found


def lds_addresses(instruction: Any, lanes: Lanes, offset: int) -> NDArray[np.int64]:
    """The sum has 32 bits: compilers fold offsets into bases that are negative."""
    addresses: NDArray[np.uint32] = lanes.vectors[register(instruction.addr)] + np.uint32(offset)
    return addresses.astype(np.int64)


def _put(bank: Words, first: int, words: Words, active: NDArray[np.bool_]) -> None:
    """words: [lane, register]."""
    for index in range(words.shape[1]):
        bank[first + index][active] = words[active, index]


def read_lds(size: int, half: str = "") -> Repair:
    """size: bytes of a lane; half: of the register that 16 bits go to, the other one stays."""

    def read(instruction: Any, lanes: Lanes) -> None:
        found = _lds_bytes(lanes, lds_addresses(instruction, lanes, lds_offset(instruction)), size)
        bank, first = lanes.bank(instruction), register(instruction.vdst)
        if size < 4:
            value = found.view({1: np.uint8, 2: np.uint16}[size])[:, 0].astype(np.uint32)
            _put(bank, first, _beside(bank[first], value, half)[:, None], lanes.active)
        else:
            _put(bank, first, found.view(np.uint32), lanes.active)

    return read


def _beside(old: Words, value: Words, half: str) -> Words:
    """The register when 16 bits go to a half of it, and the other one stays; or the value alone."""
    if half == "low":
        return old & np.uint32(0xFFFF0000) | value & np.uint32(0xFFFF)
    return old & np.uint32(0x0000FFFF) | value << np.uint32(16) if half == "high" else value


def write_lds(size: int, shift: int = 0) -> Repair:
    """size: bytes of a lane, from the bits above `shift` of its register."""

    def write(instruction: Any, lanes: Lanes) -> None:
        bank, first = lanes.bank(instruction), register(instruction.data0)
        words = np.stack([bank[first + index] >> np.uint32(shift) for index in range(-(-size // 4))], 1)
        _store(lanes, lds_addresses(instruction, lanes, lds_offset(instruction)), words, size)

    return write


def _store(lanes: Lanes, address: NDArray[np.int64], words: Words, size: int) -> None:
    inside = np.nonzero(lanes.active & (address >= 0) & (address + size <= lanes.lds.size))[0]
    lanes.lds[address[inside][:, None] + np.arange(size)] = words.view(np.uint8)[inside, :size]


def read_lds_twice(size: int, stride: int) -> Repair:
    """Two reads at offsets in units of size * stride."""

    def read(instruction: Any, lanes: Lanes) -> None:
        offsets = (int(offset) * size * stride for offset in (instruction.offset0, instruction.offset1))
        found = [_lds_bytes(lanes, lds_addresses(instruction, lanes, offset), size) for offset in offsets]
        words = np.concatenate(found, 1).view(np.uint32)  # of both before the first is put: it may be the address
        _put(lanes.bank(instruction), register(instruction.vdst), words, lanes.active)

    return read


def write_lds_twice(size: int, stride: int) -> Repair:
    """Two writes at offsets in units of size * stride."""

    def write(instruction: Any, lanes: Lanes) -> None:
        bank = lanes.bank(instruction)
        for offset, data in ((instruction.offset0, instruction.data0), (instruction.offset1, instruction.data1)):
            words = np.stack([bank[register(data) + index] for index in range(size // 4)], 1)
            _store(lanes, lds_addresses(instruction, lanes, int(offset) * size * stride), words, size)

    return write


def read_transposed(dtype: Any) -> Repair:
    """gfx950: 16 lanes fetch rows of 16 values, 8 bytes a lane, which receives a column of them.

    Four rows of 16 bits, four lanes each; or eight rows of 8 bits, two lanes each.
    """

    def read(instruction: Any, lanes: Lanes) -> None:
        found = _lds_bytes(lanes, lds_addresses(instruction, lanes, lds_offset(instruction)), 8)
        columns = found.view(dtype).reshape(4, -1, 16).transpose(0, 2, 1)
        words = np.ascontiguousarray(columns).reshape(WAVE, -1).view(np.uint32)
        _put(lanes.bank(instruction), register(instruction.vdst), words, lanes.active)

    return read


def global_addresses(instruction: Any, lanes: Lanes) -> NDArray[np.int64]:
    base, first = int(instruction.saddr.offset), register(instruction.addr)
    start: NDArray[np.int64] = lanes.vectors[first].astype(np.int64) + _signed_offset(instruction)
    if base < NO_SCALAR:
        return start + _scalar_pair(lanes, base)
    high: NDArray[np.int64] = lanes.vectors[first + 1].astype(np.int64)
    return start + (high << 32)


def _signed_offset(instruction: Any) -> int:
    offset = int(instruction.offset)
    return offset - (1 << 13) if offset >= 1 << 12 else offset


def buffer_addresses(instruction: Any, lanes: Lanes) -> NDArray[np.int64]:
    assert not int(instruction.idxen), "no buffer of ours is indexed"
    base = _place(instruction, lanes)
    own = lanes.vectors[register(instruction.vaddr)].astype(np.int64) if int(instruction.offen) else np.zeros(WAVE, int)
    return base + own + int(instruction.offset) + int(lanes.scalars[int(instruction.soffset.offset)])


def read_buffer(dtype: Any, half: str = "") -> Repair:
    """One value of less than 32 bits a lane, 0 where the buffer has ended; half: as of read_lds."""
    size = np.dtype(dtype).itemsize

    def read(instruction: Any, lanes: Lanes) -> None:
        addresses, within = _buffer_places(instruction, lanes)
        bank, first = lanes.bank(instruction), register(instruction.vdata)
        value = np.zeros(WAVE, dtype)
        for lane in np.nonzero(within)[0]:
            value[lane] = np.frombuffer(ctypes.string_at(int(addresses[lane]), size), dtype)[0]
        words = value.astype(np.int64).astype(np.uint32)  # a negative one with its sign
        _put(bank, first, _beside(bank[first], words, half)[:, None], lanes.active)

    return read


def write_buffer(size: int, shift: int = 0) -> Repair:
    """size: bytes of a lane, from the bits above `shift` of its register; nothing where the buffer has ended."""

    def write(instruction: Any, lanes: Lanes) -> None:
        addresses, within = _buffer_places(instruction, lanes)
        words = lanes.bank(instruction)[register(instruction.vdata)] >> np.uint32(shift)
        for lane in np.nonzero(within)[0]:
            ctypes.memmove(int(addresses[lane]), words[lane].tobytes(), size)

    return write


def _buffer_places(instruction: Any, lanes: Lanes) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Of each lane: its address, and whether it is active and the buffer has not ended there."""
    addresses = buffer_addresses(instruction, lanes)
    return addresses, lanes.active & (addresses - _place(instruction, lanes) < _records(instruction, lanes))


def buffer_to_lds(size: int) -> Repair:
    """Through a buffer straight into LDS, from M0 on, `size` bytes a lane; zeros where the buffer has ended."""

    def load(instruction: Any, lanes: Lanes) -> None:
        addresses, within = _buffer_places(instruction, lanes)
        _load_to_lds(lanes, np.where(within, addresses, 0), int(instruction.offset), size)

    return load


def global_to_lds(size: int) -> Repair:
    """The same by address."""

    def load(instruction: Any, lanes: Lanes) -> None:
        _load_to_lds(lanes, global_addresses(instruction, lanes), _signed_offset(instruction), size)

    return load


def _load_to_lds(lanes: Lanes, addresses: NDArray[np.int64], offset: int, size: int) -> None:
    """offset: the instruction's, which counts on both sides. Nothing is at address 0."""
    start = (int(lanes.scalars[M0]) & 0x3FFFF) + offset
    for lane in np.nonzero(lanes.active)[0]:
        found = ctypes.string_at(int(addresses[lane]), size) if addresses[lane] else bytes(size)
        into = start + int(lane) * size
        lanes.lds[into : into + size] = np.frombuffer(found, np.uint8)


def _place(instruction: Any, lanes: Lanes) -> int:
    """The address that a buffer starts at."""
    return _scalar_pair(lanes, int(instruction.srsrc.offset)) & (1 << 48) - 1


def _records(instruction: Any, lanes: Lanes) -> int:
    return int(lanes.scalars[int(instruction.srsrc.offset) + 2])


def _scalar_pair(lanes: Lanes, first: int) -> int:
    return int(lanes.scalars[first]) | int(lanes.scalars[first + 1]) << 32


def keep_smaller(addresses: Callable[[Any, Lanes], NDArray[np.int64]], data: str) -> Repair:
    """The smaller of two signed numbers of 64 bits stays in memory; ours never ask for the old one."""

    def atomic(instruction: Any, lanes: Lanes) -> None:
        first, place = register(getattr(instruction, data)), addresses(instruction, lanes)
        for lane in np.nonzero(lanes.active)[0]:
            given = int(lanes.vectors[first, lane]) | int(lanes.vectors[first + 1, lane]) << 32
            kept = ctypes.c_int64.from_address(int(place[lane]))
            kept.value = min(kept.value, ctypes.c_int64(given).value)

    return atomic
