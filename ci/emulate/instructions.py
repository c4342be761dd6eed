"""Instructions in NumPy that tinygrad's emulator lacks or gets wrong, as AMD's ISA documents define them.

Lacking: swizzles, gfx950's transposing reads, its swaps of lanes, loads into LDS by address, atomics through buffers,
conversions of fp8 in pairs, cache control. Wrong: a lane index beyond 63 of a permute (the hardware takes it modulo
64), the rows of a 32x32 product, a DPP operand that is also the destination, loads into LDS from behind a buffer's end,
loads and stores of bytes and halves through buffers (taken for whole words), quotients of tiny numbers, and 16 bits in
registers above 127 (halves.py).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ci.emulate import exchanges, float8, memory
from ci.emulate.lanes import WAVE, Lanes, Repair
from ci.emulate.products import MFMA, multiply


def repair_of(form: str, name: str) -> Repair | None:
    """The repair of an instruction, by its form and its name; None where the emulator is right.

    Raises NotImplementedError for a conversion of fp8 that float8.py lacks: the emulator knows one kind of fp8 only.
    """
    if MFMA.match(name):
        return multiply
    found = REPAIRS.get(f"{form} {name}") or (None if "DPP" in form or "SDWA" in form else REPAIRS.get(name))
    if found is None and FLOAT8.search(name):
        raise NotImplementedError(f"float8.py has no {form} {name}, and the emulator knows one kind of fp8 only")
    return found


def nothing(instruction: Any, lanes: Lanes) -> None:
    """Cache control and priorities."""


def permute_bytes(instruction: Any, lanes: Lanes) -> None:
    """Each byte of the result is one of the eight of both operands, a sign repeated, 0 or 255."""
    high, low, choice = (lanes.source(operand) for operand in (instruction.src0, instruction.src1, instruction.src2))
    eight = np.stack([low, high], 1).view(np.uint8)
    signs = np.where(eight[:, [1, 3, 5, 7]] & 0x80, 0xFF, 0)
    every = np.concatenate([eight, signs, np.zeros((WAVE, 1)), np.full((WAVE, 3), 0xFF)], 1).astype(np.uint8)
    selected = np.minimum(choice[:, None].view(np.uint8), 15)
    lanes.write(instruction.vdst, np.take_along_axis(every, selected.astype(np.int64), 1).view(np.uint32)[:, 0])


def divide(instruction: Any, lanes: Lanes) -> None:
    """The last step of a division, which has both operands: the quotient as the host rounds it."""
    assert not int(instruction.neg or 0) and not int(instruction.abs or 0), f"operands are modified: {instruction}"
    denominator, numerator = (
        lanes.source(operand).view(np.float32) for operand in (instruction.src1, instruction.src2)
    )
    with np.errstate(all="ignore"):
        lanes.write(instruction.vdst, (numerator / denominator).astype(np.float32).view(np.uint32))


FLOAT8 = re.compile("FP8|BF8|F8F6F4")
_ACROSS = {
    name: exchanges.on_words(dtype, operation)
    for name, dtype, operation in (
        ("V_ADD_F32", np.float32, np.add), ("V_SUB_F32", np.float32, np.subtract),
        ("V_MUL_F32", np.float32, np.multiply), ("V_MAX_F32", np.float32, np.fmax), ("V_MIN_F32", np.float32, np.fmin),
        ("V_ADD_U32", np.uint32, np.add), ("V_OR_B32", np.uint32, np.bitwise_or),
        ("V_AND_B32", np.uint32, np.bitwise_and), ("V_MAX_I32", np.int32, np.maximum),
        ("V_MIN_I32", np.int32, np.minimum), ("V_MAX_U32", np.uint32, np.maximum), ("V_MIN_U32", np.uint32, np.minimum),
    )
}  # fmt: skip
_WORDS = (("", 4), ("X3", 12), ("X4", 16))  # of direct loads into LDS
REPAIRS: dict[str, Repair] = {
    **{f"DS_READ_B{8 * size}": memory.read_lds(size) for size in (4, 8, 12, 16)},
    **{f"DS_WRITE_B{8 * size}": memory.write_lds(size) for size in (1, 2, 4, 8, 12, 16)},
    "DS_READ_U8": memory.read_lds(1), "DS_READ_U16": memory.read_lds(2),
    "DS_READ_U16_D16": memory.read_lds(2, "low"), "DS_READ_U16_D16_HI": memory.read_lds(2, "high"),
    "DS_READ_U8_D16": memory.read_lds(1, "low"), "DS_READ_U8_D16_HI": memory.read_lds(1, "high"),
    "DS_WRITE_B8_D16_HI": memory.write_lds(1, shift=16), "DS_WRITE_B16_D16_HI": memory.write_lds(2, shift=16),
    **{f"DS_READ2_B{8 * size}": memory.read_lds_twice(size, 1) for size in (4, 8)},
    **{f"DS_READ2ST64_B{8 * size}": memory.read_lds_twice(size, 64) for size in (4, 8)},
    **{f"DS_WRITE2_B{8 * size}": memory.write_lds_twice(size, 1) for size in (4, 8)},
    **{f"DS_WRITE2ST64_B{8 * size}": memory.write_lds_twice(size, 64) for size in (4, 8)},
    "DS_READ_B64_TR_B16": memory.read_transposed(np.uint16), "DS_READ_B64_TR_B8": memory.read_transposed(np.uint8),
    "BUFFER_LOAD_UBYTE": memory.read_buffer(np.uint8), "BUFFER_LOAD_SBYTE": memory.read_buffer(np.int8),
    "BUFFER_LOAD_USHORT": memory.read_buffer(np.uint16), "BUFFER_LOAD_SSHORT": memory.read_buffer(np.int16),
    "BUFFER_LOAD_SHORT_D16": memory.read_buffer(np.uint16, "low"),
    "BUFFER_LOAD_SHORT_D16_HI": memory.read_buffer(np.uint16, "high"),
    "BUFFER_LOAD_UBYTE_D16": memory.read_buffer(np.uint8, "low"),
    "BUFFER_LOAD_UBYTE_D16_HI": memory.read_buffer(np.uint8, "high"),
    "BUFFER_STORE_BYTE": memory.write_buffer(1), "BUFFER_STORE_BYTE_D16_HI": memory.write_buffer(1, shift=16),
    "BUFFER_STORE_SHORT": memory.write_buffer(2), "BUFFER_STORE_SHORT_D16_HI": memory.write_buffer(2, shift=16),
    "DS_SWIZZLE_B32": exchanges.swizzle,
    "DS_BPERMUTE_B32": exchanges.fetch_lane,
    "V_PERMLANE16_SWAP_B32_E32": exchanges.swap_lanes(16), "V_PERMLANE32_SWAP_B32_E32": exchanges.swap_lanes(32),
    "VOP1_DPP16 V_MOV_B32_E32": exchanges.move_across, "VOP1_DPP16 V_MOV_B32": exchanges.move_across,
    **{f"VOP2_DPP16 {name}{form}": exchanges.combine_across(operation) for name, operation in _ACROSS.items()
       for form in ("_E32", "")},
    "V_DIV_FIXUP_F32_E64": divide, "V_DIV_FIXUP_F32": divide,
    "V_CVT_PK_F32_FP8_E32": float8.widen_pair, "VOP1_SDWA V_CVT_PK_F32_FP8_E32": float8.widen_selected_pair,
    "V_CVT_SCALEF32_PK_F32_FP8": float8.widen_scaled_pair,
    "V_PERM_B32": permute_bytes, "V_PERM_B32_E64": permute_bytes,
    "GLOBAL_ATOMIC_SMIN_X2": memory.keep_smaller(memory.global_addresses, "data"),
    "BUFFER_ATOMIC_SMIN_X2": memory.keep_smaller(memory.buffer_addresses, "vdata"),
    **{f"MUBUF to LDS BUFFER_LOAD_DWORD{words}": memory.buffer_to_lds(size) for words, size in _WORDS},
    **{f"GLOBAL_LOAD_LDS_DWORD{words}": memory.global_to_lds(size) for words, size in _WORDS},
    **dict.fromkeys(("BUFFER_WBL2", "BUFFER_INV", "S_SETPRIO", "S_SLEEP", "S_SETREG_IMM32_B32"), nothing),
}  # fmt: skip
