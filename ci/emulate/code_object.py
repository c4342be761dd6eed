"""CodeObject: one kernel of an AMD code object, an ELF file, in memory, and how its arguments are laid out."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LOADED, SYMBOL_TABLES = 1, (2, 11)  # of ELF: segments that are mapped, sections with symbols
MACHINE, GFX942 = 48, 0x4C  # the byte that says which machine a file is for, and one such
PAGE = 4096
HIDDEN = 256  # bytes of hidden arguments at the end of an argument block
SCALARS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}
# Registers that the kernel's descriptor may ask for before its own, in this order: bit, how many.
PRIVATE_BUFFER, DISPATCH_POINTER, QUEUE_POINTER, ARGUMENTS, DISPATCH_ID, SCRATCH_INIT, PRIVATE_SIZE = range(7)


def pack_arguments(arguments: Sequence[tuple[str, Any]], null_pointers: int) -> bytes:
    """The kernel's argument block: (Triton's type, tensor or number) each, aligned to their sizes."""
    block = bytearray()
    for kind, value in [*arguments, *[("*i8", None)] * null_pointers]:
        pointer = kind.startswith("*")
        code = "Q" if pointer else SCALARS[kind]
        block += bytes(-len(block) % struct.calcsize(code))
        block += struct.pack(f"<{code}", _address(value) if pointer else value)
    return bytes(block)


def _address(value: torch.Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()


@dataclass(frozen=True)
class _Symbol:
    address: int
    size: int


class CodeObject:
    """A kernel ready to run. shared: bytes of LDS that a workgroup gets; scratch: bytes of a lane; fnuz: its fp8 is."""

    def __init__(self, binary: bytes, name: str, shared: int) -> None:
        self.name, self.shared = name, shared
        self.fnuz = binary[MACHINE] == GFX942
        self._memory, base = _map_segments(binary)
        symbols = dict(_symbols(binary))
        descriptor = base + symbols[f"{name}.kd"].address
        fields = ctypes.string_at(descriptor, 64)
        self.scratch, self._block = struct.unpack_from("<II", fields, 4)
        self.entry = descriptor + int(struct.unpack_from("<q", fields, 16)[0])
        self.resources = int(struct.unpack_from("<I", fields, 52)[0])
        self._wanted, preloaded = struct.unpack_from("<HH", fields, 56)
        self._preloaded = (
            preloaded & 0x7F,
            preloaded >> 7,
        )  # words of the arguments that arrive in registers, and the first

    def argument_block(self, arguments: bytes, grid: tuple[int, int, int], threads: int) -> bytes:
        """The arguments, and behind them the hidden ones: the grid and the size of its workgroups."""
        hidden = struct.pack("<3I6H", *grid, threads, 1, 1, 0, 0, 0)
        block = arguments + bytes(max(self._block - HIDDEN - len(arguments), 0)) + hidden
        return block + bytes(max(self._block - len(block), 0) + 64)

    def user_registers(self, block: bytes, address: int) -> list[int]:
        """What the scalar registers hold at the start. address: of the argument block."""
        pair = [address & 0xFFFFFFFF, address >> 32]
        values = {
            PRIVATE_BUFFER: [0] * 4, DISPATCH_POINTER: [0] * 2, QUEUE_POINTER: [0] * 2, ARGUMENTS: pair,
            DISPATCH_ID: [0] * 2, SCRATCH_INIT: [0] * 2, PRIVATE_SIZE: [self.scratch],
        }  # fmt: skip
        wanted = [value for bit, own in values.items() if self._wanted >> bit & 1 for value in own]
        words, first = self._preloaded
        return wanted + list(struct.unpack_from(f"<{words}I", block, 4 * first))


def _map_segments(binary: bytes) -> tuple[Any, int]:
    """The memory, which must be kept, and the address that stands for 0 in the file."""
    assert binary[:5] == b"\x7fELF\x02", "not an ELF file of 64 bits"
    offset, size, count = *struct.unpack_from("<Q", binary, 32), *struct.unpack_from("<HH", binary, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", binary, offset + index * size) for index in range(count)]
    segments = [(place, start, length, room) for kind, _, start, place, _, length, room, _ in headers if kind == LOADED]
    memory = ctypes.create_string_buffer(max(place + room for place, _, _, room in segments) + 2 * PAGE)
    base = -(-ctypes.addressof(memory) // PAGE) * PAGE
    for place, start, length, _ in segments:
        ctypes.memmove(base + place, binary[start : start + length], length)
    return memory, base


def _symbols(binary: bytes) -> Iterator[tuple[str, _Symbol]]:
    offset = struct.unpack_from("<Q", binary, 40)[0]
    count = struct.unpack_from("<H", binary, 60)[0]
    sections = [struct.unpack_from("<IIQQQQIIQQ", binary, offset + index * 64) for index in range(count)]
    for _, kind, _, _, start, size, link, _, _, _ in sections:
        if kind in SYMBOL_TABLES:
            names = sections[link][4]
            for at in range(start, start + size, 24):
                name, _, _, _, address, length = struct.unpack_from("<IBBHQQ", binary, at)
                text = binary[names + name : binary.index(b"\0", names + name)]
                yield text.decode(), _Symbol(address, length)
