"""A kernel that only tests need: fp8 there and back."""

import triton
import triton.language as tl

from portable_mla.runtime.kernels.float8 import float8_bits, float8_values


@triton.jit
def round_trip_kernel(values_ptr, bits_ptr, wide_ptr, COUNT: tl.constexpr, FNUZ: tl.constexpr):
    """bits of values, and wide values of those bits."""
    index = tl.arange(0, COUNT)
    bits = float8_bits(tl.load(values_ptr + index), FNUZ)
    tl.store(bits_ptr + index, bits)
    tl.store(wide_ptr + index, float8_values(bits, FNUZ))
