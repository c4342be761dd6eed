"""Matrix products, MFMA."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ci.emulate.lanes import LANE, VECTOR, WAVE, Lanes, register

MFMA = re.compile(r"V_MFMA_F32_(\d+)X\1X(\d+)_(\w+)")


def multiply(instruction: Any, lanes: Lanes) -> None:
    """D = A B + C of MxK and KxM, in float64 with one rounding; EXEC is ignored."""
    size, depth, kind = _product(instruction)
    groups = WAVE // size
    each = depth // groups  # values of a lane
    acc = int(getattr(instruction, "acc", 0) or 0)
    a = _operand(lanes, instruction.src0, acc & 1, each, kind).reshape(each, groups, size)
    b = _operand(lanes, instruction.src1, acc >> 1 & 1, each, kind).reshape(each, groups, size)
    product = a.transpose(2, 1, 0).reshape(size, depth) @ b.transpose(1, 0, 2).reshape(depth, size)
    count = size * size // WAVE
    index = np.arange(count)[:, None]
    row = 8 * (index // 4) + 4 * (LANE // 32) + index % 4 if size == 32 else 4 * (LANE // 16) + index
    bank = lanes.accumulators if int(getattr(instruction, "acc_cd", 0) or 0) else lanes.vectors
    at = int(instruction.src2.offset)
    start = bank[at - VECTOR : at - VECTOR + count] if at >= VECTOR else np.full((count, WAVE), lanes.scalars[at])
    result = start.astype(np.uint32).view(np.float32).astype(np.float64) + product[row, LANE % size]
    first = register(instruction.vdst)
    bank[first : first + count] = result.astype(np.float32).view(np.uint32)


def _product(instruction: Any) -> tuple[int, int, str]:
    """M, K and the type of a matrix instruction."""
    found = MFMA.match(str(instruction.op.name))
    assert found is not None, instruction
    return int(found[1]), int(found[2]), found[3].removesuffix("_1K")


def _operand(lanes: Lanes, operand: Any, accumulator: int, each: int, kind: str) -> NDArray[np.float64]:
    """[value, lane]."""
    bank, first = lanes.accumulators if accumulator else lanes.vectors, int(operand.offset) - VECTOR
    if kind == "F32":
        return bank[first : first + each].view(np.float32).astype(np.float64)
    halves = np.ascontiguousarray(bank[first : first + each // 2].T).view(np.uint16)  # [lane, value]
    if kind == "BF16":
        return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32).T.astype(np.float64)
    assert kind == "F16", f"no matrix product of {kind}"
    return halves.view(np.float16).T.astype(np.float64)
