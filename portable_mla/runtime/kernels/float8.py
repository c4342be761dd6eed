"""e4m3 values by integer arithmetic, for every GPU: FNUZ is AMD's flavour (gfx942), else OCP's.

Both have a sign, 4 bits of exponent and 3 of fraction. OCP's bias is 7, its largest value 448, and 0x7f and 0xff are
NaN; FNUZ's are 8 and 240, its NaN is 0x80, and it has no negative zero.
"""

import triton
import triton.language as tl


@triton.jit
def float8_bits(values, FNUZ: tl.constexpr):
    """uint8 of float32 values, rounded to nearest even and clamped to the range; NaN stays NaN."""
    BIAS: tl.constexpr = 8 if FNUZ else 7
    LARGEST: tl.constexpr = 0x43700000 if FNUZ else 0x43E00000  # float32 bits of 240 and 448
    MAGIC: tl.constexpr = (148 - BIAS) << 23  # float32 bits of the power of two whose last place is a subnormal's step
    bits = values.to(tl.int32, bitcast=True)
    size = tl.minimum(bits & 0x7FFFFFFF, LARGEST)  # positive floats are in the order of their bits
    rounded = (size + 0x7FFFF + ((size >> 20) & 1)) >> 20
    normal = rounded - ((127 - BIAS) << 3)
    magic = tl.full([1], MAGIC, tl.int32).to(tl.float32, bitcast=True)
    subnormal = (size.to(tl.float32, bitcast=True) + magic).to(tl.int32, bitcast=True) - MAGIC
    code = tl.where(size < ((128 - BIAS) << 23), subnormal, normal)
    sign = (bits >> 24) & 0x80
    if FNUZ:
        code = tl.where(code == 0, 0, code | sign)
        code = tl.where(values != values, 0x80, code)
    else:
        code = tl.where(values != values, 0x7F, code) | sign
    return code.to(tl.uint8)


@triton.jit
def float8_values(bits, FNUZ: tl.constexpr):
    """float16 of uint8, exact: the fields are moved to their places in a float16, whose bias is 15."""
    wide = bits.to(tl.uint16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    if FNUZ:
        return tl.where(bits == 0x80, float("nan"), half * 128.0).to(tl.float16)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half * 256.0).to(tl.float16)
