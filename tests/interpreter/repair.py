"""Repairs of Triton's interpreter, for tests alone.

It computes bfloat16 arithmetic on raw bit patterns and truncates where the hardware rounds to nearest even; it reads
fp8's NaN as a number and does not know e4m3fnuz; it runs no PTX; its 3.6 cannot loop up to a loaded bound with numpy
2.4.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

Handle = Any  # interpreter.TensorHandle: `data`, a numpy array, and `dtype`, Triton's
FLOAT8 = {"fp8e4nv": torch.float8_e4m3fn, "fp8e4b8": torch.float8_e4m3fnuz}
Patch = tuple[object, str, object, object]  # owner, attribute, as Triton has it, repaired
Builder = interpreter.InterpreterBuilder


def is_bfloat16(handle: Handle) -> bool:
    """Whether the values are bfloat16, kept as the bits of a uint16 array."""
    data = getattr(handle, "data", None)
    return data is not None and handle.dtype.scalar == tl.bfloat16 and data.dtype == np.uint16


def widened(handle: Handle) -> Handle:
    """bfloat16 as float32; anything else as it is."""
    if not is_bfloat16(handle):
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def bfloat16_bits(values: NDArray[Any]) -> NDArray[np.uint16]:
    """float32 rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    to_even = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return np.where(np.isnan(values), (bits >> 16) | 0x40, (bits + to_even) >> 16).astype(np.uint16)


def _narrowed(result: Handle) -> Handle:
    if result.data.dtype == np.bool_:
        return result
    return interpreter.TensorHandle(bfloat16_bits(result.data), tl.bfloat16)


def _repaired_dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Handle, b: Handle, *rest: Any) -> Handle:
        return original(self, widened(a), widened(b), *rest)

    return create_dot


def _repaired_operator(original: Callable[..., Any]) -> Callable[..., Any]:
    """For operators of one value or of two; the last argument is numpy's function."""

    def operator(self: Any, *arguments: Any) -> Handle:
        *values, function = arguments
        result = original(self, *map(widened, values), function)
        return _narrowed(result) if any(map(is_bfloat16, values)) else result

    return operator


def _repaired_conversion(original: Callable[..., Any]) -> Callable[..., Any]:
    def convert_float(values: NDArray[Any], source: Any, target: Any, rounding: Any) -> NDArray[Any]:
        if str(source) == "fp32" and str(target) == "bf16":
            return bfloat16_bits(values.view(np.float32))
        converted: NDArray[Any] = original(values, source, target, rounding)
        return converted

    return convert_float


def _repaired_float8(original: Callable[..., Any]) -> Callable[..., Any]:
    """From fp8 to wider floats, which hold every value of it."""

    def convert_float(values: NDArray[Any], source: Any, target: Any, rounding: Any) -> NDArray[Any]:
        if str(source) not in FLOAT8:
            converted: NDArray[Any] = original(values, source, target, rounding)
            return converted
        bits = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8))
        wide = bits.view(FLOAT8[str(source)]).float().numpy()
        if str(target) == "bf16":
            return bfloat16_bits(wide)
        return wide.astype(np.float16).view(np.uint16) if str(target) == "fp16" else wide.view(np.uint32)

    return convert_float


class Outputs(list[Handle]):
    """Of inline assembly."""

    def get_result(self, index: int) -> Handle:
        return self[index]


def _split_pairs(self: Any, assembly: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int) -> Any:
    """The one piece of PTX there is: two int16 are permuted by byte, and each half converted to two float16."""
    selector = re.search(r"prmt.b32 both, \$2, 0, 0x([0-3]{4});", assembly)
    assert selector is not None and assembly.count("cvt.rn.f16x2.e4m3x2") == 2 and pack == 2, assembly
    (handle,) = values
    both = np.ascontiguousarray(handle.data).view(np.uint8).reshape(-1, 4)[:, [int(one) for one in selector[1][::-1]]]
    halves = (np.ascontiguousarray(both[:, half : half + 2]) for half in (0, 2))
    wide = (torch.from_numpy(half).view(torch.float8_e4m3fn).to(torch.float16).numpy() for half in halves)
    return Outputs(interpreter.TensorHandle(one.reshape(handle.data.shape), tl.float16) for one in wide)


def _repaired_language(original: Callable[..., Any]) -> Callable[..., Any]:
    """Triton replaces how a type is found anew for each launch."""

    def patch_language(language: Any, *rest: Any) -> Any:
        result = original(language, *rest)
        to_ir = language.dtype.to_ir
        language.dtype.to_ir = lambda self, builder: (
            builder.get_fp8e4b8_ty() if self.name == "fp8e4b8" else to_ir(self, builder)
        )
        return result

    return patch_language


def _repaired_tensor_patch(original: Callable[..., Any]) -> Callable[..., Any]:
    """Triton sets `__index__` anew for each launch, and takes it back afterwards."""

    def patch_tensor(tensor: Any, *rest: Any) -> Any:
        result = original(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])
        return result

    return patch_tensor


@functools.cache
def _languages_of(function: Any) -> tuple[Any, ...]:
    return tuple(value for value in function.__globals__.values() if value is tl or value is tl.core)


def _once_a_launch(original: Callable[..., Any]) -> Callable[..., Any]:
    """Triton replaces the language anew for each call of a kernel's functions too, which was a third of the time; what
    it does for the kernel it puts back after the launch."""

    def patch_language(function: Any) -> Any:
        replaced = not any(tl.core.is_builtin(language.load) for language in _languages_of(function))
        return interpreter._LangPatchScope() if replaced else original(function)

    return patch_language


def _patch(owner: Any, attribute: str, repaired: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Patch:
    original = getattr(owner, attribute)
    return owner, attribute, original, repaired(original)


REPAIRS: dict[str, tuple[Patch, ...]] = {
    "arithmetic": (
        _patch(Builder, "create_dot", _repaired_dot),
        _patch(Builder, "binary_op", _repaired_operator),
        _patch(Builder, "unary_op", _repaired_operator),
    ),
    "rounding": (_patch(interpreter, "_convert_float", _repaired_conversion),),
    "fp8": (
        _patch(interpreter, "_patch_lang_core", _repaired_language),
        _patch(interpreter, "_convert_float", lambda original: _repaired_float8(_repaired_conversion(original))),
    ),
    "assembly": (_patch(Builder, "create_inline_asm", lambda _: _split_pairs),),
    "loop bounds": (_patch(interpreter, "_patch_lang_tensor", _repaired_tensor_patch),),
}


@contextmanager
def repaired() -> Iterator[None]:
    """Inside, all repairs hold."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, attribute, _, repaired in itertools.chain(*REPAIRS.values()):
            patch.setattr(owner, attribute, repaired)
        patch.setattr(interpreter, "_patch_lang", _once_a_launch(interpreter._patch_lang))
        yield


@contextmanager
def without(name: str) -> Iterator[None]:
    """Inside `repaired`: as Triton has it in this one respect."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, attribute, original, _ in REPAIRS[name]:
            patch.setattr(owner, attribute, original)
        yield
