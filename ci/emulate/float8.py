"""Conversions of fp8 (e4m3), in pairs, to float32. gfx942's numbers are e4m3fnuz, gfx950's those of OCP."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ci.emulate.lanes import Lanes, Words, register

WORD_0, WORD_1 = 4, 5  # which half of a register an SDWA operand is


def _values(dtype: torch.dtype) -> NDArray[np.float32]:
    """Of each byte."""
    found: NDArray[np.float32] = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    return found


FNUZ, OCP = _values(torch.float8_e4m3fnuz), _values(torch.float8_e4m3fn)


def widen_pair(instruction: Any, lanes: Lanes) -> None:
    """The lower half of the operand."""
    _widen(instruction, lanes, lanes.source(instruction.src0), upper=False)


def widen_selected_pair(instruction: Any, lanes: Lanes) -> None:
    """SDWA: the half that it selects."""
    assert int(instruction.src0_sel) in (WORD_0, WORD_1) and not int(instruction.s0), f"no half of: {instruction}"
    operand = lanes.vectors[register(instruction.vsrc0)].copy()
    _widen(instruction, lanes, operand, upper=int(instruction.src0_sel) == WORD_1)


def widen_scaled_pair(instruction: Any, lanes: Lanes) -> None:
    """gfx950: times the power of two that is the second operand's exponent."""
    exponent = (lanes.source(instruction.src1) >> np.uint32(23) & np.uint32(0xFF)).astype(np.int32) - 127
    _widen(
        instruction, lanes, lanes.source(instruction.src0), upper=bool(int(instruction.opsel) & 1), exponent=exponent
    )


def _widen(instruction: Any, lanes: Lanes, operand: Words, *, upper: bool, exponent: Any = 0) -> None:
    pair = operand.view(np.uint8).reshape(-1, 4)[:, 2:] if upper else operand.view(np.uint8).reshape(-1, 4)[:, :2]
    with np.errstate(invalid="ignore"):  # NaN
        values = ((FNUZ if lanes.fnuz else OCP)[pair].T * np.ldexp(1.0, exponent)).astype(np.float32)
    first = register(instruction.vdst)
    for index in range(2):
        lanes.vectors[first + index][lanes.active] = values[index].view(np.uint32)[lanes.active]
